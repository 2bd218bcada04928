#include "frame.h"

#include <inttypes.h>
#include <string.h>

#include "bytes.h"

static const uint8_t magic[4] = {'d', 's', 's', 'F'};

void dss_frame_encode(const dss_frame_t *frame, uint32_t epoch, uint8_t bytes[DSS_FRAME_BYTES]) {
    memset(bytes, 0, DSS_FRAME_BYTES);
    memcpy(bytes, magic, sizeof magic);
    bytes[4] = DSS_FRAME_VERSION;
    bytes[5] = (uint8_t)frame->type;
    bytes[6] = (uint8_t)frame->phase;
    dss_put_u32(bytes + 8, epoch);
    dss_put_u32(bytes + 12, frame->payload_bytes);
    dss_put_u64(bytes + 16, frame->key.channel);
    dss_put_u64(bytes + 24, frame->key.sequence);
    dss_put_u32(bytes + 32, frame->key.part);
    dss_put_u32(bytes + 36, frame->key.stage);
    dss_put_u64(bytes + 40, frame->offset);
    dss_put_u32(bytes + 48, frame->slot);
}

static dss_status_t check_envelope(const uint8_t *bytes, uint32_t epoch, dss_error_t *error_p) {
    if (memcmp(bytes, magic, sizeof magic) != 0)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "frame: begins with %02x%02x%02x%02x, not with \"dssF\"", bytes[0], bytes[1],
                        bytes[2], bytes[3]);
    if (bytes[4] != DSS_FRAME_VERSION)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "frame: version %u, expected %u", bytes[4], DSS_FRAME_VERSION);
    if (dss_get_u32(bytes + 8) != epoch)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "frame: epoch %08" PRIx32 ", expected %08" PRIx32, dss_get_u32(bytes + 8), epoch);
    if (!dss_bytes_zero(bytes, 7, 8) || !dss_bytes_zero(bytes, 52, DSS_FRAME_BYTES))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "frame: reserved bytes are %02x and %016" PRIx64 "..., not 0", bytes[7],
                        dss_get_u64(bytes + 52));
    return DSS_OK;
}

/* What a payload's size and the fields of one type must be, given the type. */
static dss_status_t check_fields(const dss_frame_t *frame, dss_error_t *error_p) {
    const bool is_board = frame->type == DSS_FRAME_BOARD;
    const bool is_data = frame->type == DSS_FRAME_DATA || is_board;
    const dss_key_t *key = &frame->key;
    uint32_t least = 0;
    uint32_t most = DSS_FRAME_MAX_PAYLOAD_BYTES;
    switch (frame->type) {
    case DSS_FRAME_OPEN:
        least = most = DSS_SIGNATURE_BYTES;
        break;
    case DSS_FRAME_DATA:
        break;
    case DSS_FRAME_BOARD:
        least = 1;
        most = DSS_BOARD_SLOT_BYTES;
        break;
    case DSS_FRAME_FAIL:
        least = 1;
        break;
    case DSS_FRAME_GOODBYE:
    case DSS_FRAME_PING:
    case DSS_FRAME_PONG:
    case DSS_FRAME_SEEN:
        most = 0;
        if (key->channel || key->sequence || key->part || key->stage)
            return dss_fail(error_p, DSS_ERR_CORRUPT,
                            "frame: key %" PRIx64 "/%" PRIu64 "/%" PRIu32 "/%" PRIu32 " in a frame of type %d", key->channel,
                            key->sequence, key->part, key->stage, (int)frame->type);
        break;
    default:
        return dss_fail(error_p, DSS_ERR_CORRUPT, "frame: type %d is unknown", (int)frame->type);
    }
    if (frame->phase > (is_data ? DSS_PHASE_GATHER : DSS_PHASE_REDUCE))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "frame: phase %d in a frame of type %d", (int)frame->phase, (int)frame->type);
    if (is_board && frame->phase != DSS_PHASE_GATHER)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "frame: phase %d on a board", (int)frame->phase);
    if (frame->slot >= (is_board ? DSS_BOARD_SLOTS : 1))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "frame: slot %" PRIu32 " in a frame of type %d", frame->slot, (int)frame->type);
    if (frame->payload_bytes < least || frame->payload_bytes > most)
        return dss_fail(error_p, DSS_ERR_CORRUPT,
                        "frame: payload of %" PRIu32 " bytes in a frame of type %d, expected %" PRIu32 " to %" PRIu32,
                        frame->payload_bytes, (int)frame->type, least, most);
    if (!is_data && frame->offset)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "frame: offset %" PRIu64 " in a frame of type %d", frame->offset,
                        (int)frame->type);
    if (frame->offset > UINT64_MAX - frame->payload_bytes)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "frame: offset %" PRIu64 " and a payload of %" PRIu32 " bytes overflow",
                        frame->offset, frame->payload_bytes);
    return DSS_OK;
}

dss_status_t dss_frame_decode(const uint8_t bytes[DSS_FRAME_BYTES], uint32_t epoch, dss_frame_t *frame_p, dss_error_t *error_p) {
    dss_status_t status = check_envelope(bytes, epoch, error_p);
    if (status != DSS_OK)
        return status;
    const dss_frame_t frame = {
        .type = (dss_frame_type_t)bytes[5],
        .phase = (dss_phase_t)bytes[6],
        .payload_bytes = dss_get_u32(bytes + 12),
        .key = {dss_get_u64(bytes + 16), dss_get_u64(bytes + 24), dss_get_u32(bytes + 32), dss_get_u32(bytes + 36)},
        .offset = dss_get_u64(bytes + 40),
        .slot = dss_get_u32(bytes + 48),
    };
    status = check_fields(&frame, error_p);
    if (status == DSS_OK)
        *frame_p = frame;
    return status;
}

void dss_signature_encode(const dss_signature_t *signature, uint8_t bytes[DSS_SIGNATURE_BYTES]) {
    memset(bytes, 0, DSS_SIGNATURE_BYTES);
    bytes[0] = signature->kind;
    bytes[1] = signature->dtype;
    bytes[2] = signature->reduction;
    dss_put_u32(bytes + 4, signature->member_count);
    dss_put_u64(bytes + 8, signature->element_count);
    dss_put_u64(bytes + 16, signature->members_hash);
    dss_put_u64(bytes + 24, signature->layout);
}

dss_status_t dss_signature_decode(const uint8_t bytes[DSS_SIGNATURE_BYTES], dss_signature_t *signature_p, dss_error_t *error_p) {
    if (bytes[0] < DSS_OPERATION_AVERAGE || bytes[0] > DSS_OPERATION_CROSSING_OF_VALUES)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "signature: kind %u is unknown", bytes[0]);
    if (dss_dtype_bytes((dss_dtype_t)bytes[1]) == 0)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "signature: dtype %u is unknown", bytes[1]);
    if (bytes[2] > DSS_BXOR)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "signature: reduction %u is unknown", bytes[2]);
    if (dss_get_u32(bytes + 4) == 0)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "signature: member count 0, expected at least 1");
    if (!dss_bytes_zero(bytes, 3, 4) || !dss_bytes_zero(bytes, 32, DSS_SIGNATURE_BYTES))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "signature: reserved bytes are not 0");
    *signature_p = (dss_signature_t){
        .kind = bytes[0],
        .dtype = bytes[1],
        .reduction = bytes[2],
        .member_count = dss_get_u32(bytes + 4),
        .element_count = dss_get_u64(bytes + 8),
        .members_hash = dss_get_u64(bytes + 16),
        .layout = dss_get_u64(bytes + 24),
    };
    return DSS_OK;
}
