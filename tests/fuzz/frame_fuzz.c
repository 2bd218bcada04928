/*
 * All that is decoded from a peer's or the store's bytes: frames, signatures, cards. The first byte of an input says which.
 *
 * Bytes are refused with a text, or mean something that encodes to the very same bytes. And the other way round: fields that the
 * input chooses come back as they were exactly if they are sound by the rules of frame.h, written down here a second time.
 */
#include "driver.h"

#include "address.h"
#include "frame.h"

#define EPOCH 0xa1b2c3d4u

const unsigned long fuzz_input_count = 500000;
unsigned long fuzz_through_count;

typedef enum target { FRAME, SIGNATURE, CARD, FIELDS, TARGET_COUNT } target_t;

static uint64_t number(const uint8_t *bytes, unsigned bytes_count) {
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes_count; i++)
        value |= (uint64_t)bytes[i] << 8 * i;
    return value;
}

static void check_refusal(dss_status_t status, const dss_error_t *error) {
    CHECK_STATUS(status, DSS_ERR_CORRUPT);
    CHECK_STATUS(error->status, DSS_ERR_CORRUPT);
    CHECK_FOR(error->text[0] && memchr(error->text, 0, sizeof error->text), "a refusal without a text");
}

static void try_frame(const uint8_t bytes[DSS_FRAME_BYTES]) {
    uint8_t again[DSS_FRAME_BYTES];
    dss_error_t error = {DSS_OK, ""};
    dss_frame_t frame;
    const dss_status_t status = dss_frame_decode(bytes, EPOCH, &frame, &error);
    if (status != DSS_OK) {
        check_refusal(status, &error);
        return;
    }
    dss_frame_encode(&frame, EPOCH, again);
    CHECK(memcmp(again, bytes, sizeof again) == 0);
    CHECK_STATUS(dss_frame_decode(bytes, EPOCH ^ 1, &frame, &error), DSS_ERR_CORRUPT);
    fuzz_through_count++;
}

static bool is_sound(const dss_frame_t *frame) {
    const bool plain = frame->phase == DSS_PHASE_REDUCE && frame->offset == 0;
    if (frame->slot > 0 && frame->type != DSS_FRAME_BOARD)
        return false;
    switch (frame->type) {
    case DSS_FRAME_OPEN:
        return plain && frame->payload_bytes == DSS_SIGNATURE_BYTES;
    case DSS_FRAME_DATA:
        return (frame->phase == DSS_PHASE_REDUCE || frame->phase == DSS_PHASE_GATHER) &&
               frame->payload_bytes <= DSS_FRAME_MAX_PAYLOAD_BYTES && frame->offset + frame->payload_bytes >= frame->offset;
    case DSS_FRAME_BOARD:
        return frame->phase == DSS_PHASE_GATHER && frame->payload_bytes > 0 && frame->payload_bytes <= DSS_BOARD_SLOT_BYTES &&
               frame->slot < DSS_BOARD_SLOTS && frame->offset + frame->payload_bytes >= frame->offset;
    case DSS_FRAME_FAIL:
        return plain && frame->payload_bytes > 0 && frame->payload_bytes <= DSS_FRAME_MAX_PAYLOAD_BYTES;
    case DSS_FRAME_GOODBYE:
    case DSS_FRAME_PING:
    case DSS_FRAME_PONG:
    case DSS_FRAME_SEEN:
        return plain && frame->payload_bytes == 0 && frame->key.channel == 0 && frame->key.sequence == 0 && frame->key.part == 0 &&
               frame->key.stage == 0;
    default:
        return false;
    }
}

static void try_fields(const uint8_t *bytes) {
    const dss_frame_t frame = {
        .type = (dss_frame_type_t)(bytes[0] % 10),
        .phase = (dss_phase_t)(bytes[1] % 4),
        .payload_bytes = (uint32_t)number(bytes + 2, 4),
        .key = {number(bytes + 6, 8), number(bytes + 14, 8), (uint32_t)number(bytes + 22, 4), (uint32_t)number(bytes + 34, 4)},
        .offset = number(bytes + 26, 8),
        .slot = bytes[38],
    };
    uint8_t encoded[DSS_FRAME_BYTES];
    dss_frame_t back;
    dss_frame_encode(&frame, EPOCH, encoded);
    const dss_status_t status = dss_frame_decode(encoded, EPOCH, &back, NULL);
    CHECK_FOR((status == DSS_OK) == is_sound(&frame), "type %d, phase %d, %u bytes", (int)frame.type, (int)frame.phase,
              frame.payload_bytes);
    if (status != DSS_OK)
        return;
    CHECK(back.type == frame.type && back.phase == frame.phase && back.payload_bytes == frame.payload_bytes);
    CHECK(back.key.channel == frame.key.channel && back.key.sequence == frame.key.sequence && back.key.part == frame.key.part &&
          back.key.stage == frame.key.stage);
    CHECK_EQUAL(back.offset, frame.offset);
    CHECK_EQUAL(back.slot, frame.slot);
    fuzz_through_count++;
}

static void try_signature(const uint8_t bytes[DSS_SIGNATURE_BYTES]) {
    uint8_t again[DSS_SIGNATURE_BYTES];
    dss_error_t error = {DSS_OK, ""};
    dss_signature_t signature;
    const dss_status_t status = dss_signature_decode(bytes, &signature, &error);
    if (status != DSS_OK) {
        check_refusal(status, &error);
        return;
    }
    CHECK(signature.member_count > 0 && dss_dtype_bytes((dss_dtype_t)signature.dtype) > 0);
    dss_signature_encode(&signature, again);
    CHECK(memcmp(again, bytes, sizeof again) == 0);
    fuzz_through_count++;
}

static void try_card(const uint8_t bytes[DSS_CARD_BYTES]) {
    uint8_t again[DSS_CARD_BYTES];
    char text[DSS_ADDRESS_TEXT_BYTES];
    struct sockaddr_storage storage;
    dss_error_t error = {DSS_OK, ""};
    dss_card_t card;
    const dss_status_t status = dss_card_decode(bytes, &card, &error);
    if (status != DSS_OK) {
        check_refusal(status, &error);
        return;
    }
    dss_card_encode(&card, again);
    CHECK(memcmp(again, bytes, sizeof again) == 0);
    dss_address_t back;
    const socklen_t length = dss_address_to_socket(&card.address, &storage);
    dss_address_from_socket(&storage, &back);
    CHECK(length > 0 || card.address.family == 0);
    CHECK(back.family == card.address.family && back.port == card.address.port &&
          memcmp(back.bytes, card.address.bytes, sizeof back.bytes) == 0);
    CHECK(dss_address_text(&card.address, text)[0] && memchr(text, 0, sizeof text));
    fuzz_through_count++;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t bytes_count) {
    uint8_t padded[DSS_CARD_BYTES] = {0};
    if (bytes_count < 2)
        return 0;
    memcpy(padded, bytes + 1, bytes_count - 1 < sizeof padded ? bytes_count - 1 : sizeof padded);
    switch ((target_t)(bytes[0] % TARGET_COUNT)) {
    case FRAME:
        try_frame(padded);
        break;
    case SIGNATURE:
        try_signature(padded);
        break;
    case CARD:
        try_card(padded);
        break;
    default:
        try_fields(padded);
    }
    return 0;
}

size_t fuzz_seed(unsigned number_of_seed, uint8_t bytes[FUZZ_INPUT_BYTES]) {
    static const dss_frame_t frames[] = {
        {DSS_FRAME_OPEN, DSS_PHASE_REDUCE, DSS_SIGNATURE_BYTES, {1, 2, 3, 0}, 0, 0},
        {DSS_FRAME_DATA, DSS_PHASE_GATHER, 4096, {UINT64_MAX, 2, 3, 4}, UINT64_MAX - 4096, 0},
        {DSS_FRAME_FAIL, DSS_PHASE_REDUCE, 20, {1, 2, 3, 0}, 0, 0},
        {DSS_FRAME_BOARD, DSS_PHASE_GATHER, 4096, {1, 2, 3, 0}, 65536, 31},
        {DSS_FRAME_GOODBYE, DSS_PHASE_REDUCE, 0, {0, 0, 0, 0}, 0, 0},
    };
    static const dss_signature_t signature = {DSS_OPERATION_AVERAGE, DSS_BFLOAT16, DSS_SUM, 3, 1000, 5, 6};
    static const dss_card_t cards[] = {
        {.address = {4, {10, 1, 2, 3}, 4567}, .has_unix = true, .unix_name = "a name of 16 by", .epoch = 7, .secret = "not told"},
        {.address = {6, {0x20, 1, [15] = 9}, 4567}},
    };
    static const uint8_t fields[4][40] = {
        {FIELDS, DSS_FRAME_FAIL, DSS_PHASE_REDUCE, 20, 0, 0, 0, 1, 2, 3},
        {FIELDS, DSS_FRAME_DATA, DSS_PHASE_GATHER, 16, [27] = 0xef, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
         0xff}, /* just no overflow */
        {FIELDS, DSS_FRAME_GOODBYE},
        {FIELDS, DSS_FRAME_BOARD, DSS_PHASE_GATHER, 16, [39] = 31},
    };
    memset(bytes, 0, FUZZ_INPUT_BYTES);
    if (number_of_seed < 5) {
        bytes[0] = FRAME;
        dss_frame_encode(&frames[number_of_seed], EPOCH, bytes + 1);
        return 1 + DSS_FRAME_BYTES;
    }
    switch (number_of_seed) {
    case 5:
        bytes[0] = SIGNATURE;
        dss_signature_encode(&signature, bytes + 1);
        return 1 + DSS_SIGNATURE_BYTES;
    case 6:
    case 7:
        bytes[0] = CARD;
        dss_card_encode(&cards[number_of_seed - 6], bytes + 1);
        return 1 + DSS_CARD_BYTES;
    case 8:
    case 9:
    case 10:
    case 11:
        memcpy(bytes, fields[number_of_seed - 8], sizeof fields[0]);
        return sizeof fields[0];
    default:
        return 0;
    }
}
