/*
 * frame.h: what travels between two ranks once they know each other: frames of a fixed header and a payload.
 *
 * Little-endian, fixed offsets, every field checked before it is used: a peer is trusted to be of this job (handshake.h), but not
 * to be sane. An operation is known by its key: a channel (the averages of one sync, the collectives of a group), a sequence number
 * on it (the step, or the order of posting) and a part (bucket and stripe). Groups need no connection and no state of their own:
 * who takes part stands in the signature that every member sends first.
 *
 * Headers and payloads are padded to whole cache lines, so that values lie in shared memory as they do in tensors: copies between
 * places that differ in that take several times as long.
 */
#ifndef DSS_FRAME_H
#define DSS_FRAME_H

#include "board.h"
#include "dssync_engine.h"
#include "status.h"

#define DSS_FRAME_BYTES 64u
#define DSS_FRAME_ALIGNMENT 64u /* a payload is followed by zeros up to a multiple of this */
#define DSS_FRAME_VERSION 3u
#define DSS_FRAME_MAX_PAYLOAD_BYTES (1u << 20)
#define DSS_SIGNATURE_BYTES 64u

typedef enum dss_frame_type {
    DSS_FRAME_OPEN = 1,    /* the sender has posted the operation; payload: its signature */
    DSS_FRAME_DATA = 2,    /* values; payload: bytes [offset, offset + payload_bytes) of what `phase` says */
    DSS_FRAME_FAIL = 3,    /* the channel has failed at the sender; payload: text, not empty */
    DSS_FRAME_GOODBYE = 4, /* the sender closes in good order; no payload, no key, as in what follows */
    DSS_FRAME_PING = 5,    /* are you there? */
    DSS_FRAME_PONG = 6,    /* the answer */
    DSS_FRAME_BOARD = 7,   /* values of phase GATHER that lie in a slot of the sender's board; no payload follows */
    DSS_FRAME_SEEN = 8,    /* the sender can read the receiver's board; no payload, no key */
} dss_frame_type_t;

typedef enum dss_phase {
    DSS_PHASE_REDUCE = 0, /* a member's own values, to whoever reduces them */
    DSS_PHASE_GATHER = 1, /* a reduced shard, from its owner to all */
} dss_phase_t;

typedef struct dss_frame {
    dss_frame_type_t type;
    dss_phase_t phase;      /* of DATA; else 0 */
    uint32_t payload_bytes; /* of BOARD: in the slot */
    dss_key_t key;          /* GOODBYE, PING, PONG, SEEN: all 0 */
    uint64_t offset;        /* of DATA and BOARD, in bytes from the begin of the shard; else 0 */
    uint32_t slot;          /* of BOARD; else 0 */
} dss_frame_t;

/* Layout: 0 magic "dssF" | 4 u8 version | 5 u8 type | 6 u8 phase | 7 u8 0 | 8 u32 epoch | 12 u32 payload_bytes | 16 u64 channel |
 * 24 u64 sequence | 32 u32 part | 36 u32 stage | 40 u64 offset | 48 u32 slot | 52..63 0. `epoch` is the low half of the context's.
 */
void dss_frame_encode(const dss_frame_t *frame, uint32_t epoch, uint8_t bytes[DSS_FRAME_BYTES]);
/* DSS_ERR_CORRUPT, saying which field and value, for anything that dss_frame_encode could not have written: wrong magic, version,
 * epoch, type or phase, reserved bytes set, a payload above the maximum or of a size that the type does not have, offset + payload
 * overflowing. */
dss_status_t dss_frame_decode(const uint8_t bytes[DSS_FRAME_BYTES], uint32_t epoch, dss_frame_t *frame_p, dss_error_t *error_p);

/* What an operation is; equal on all its members, or it fails on all of them. */
typedef struct dss_signature {
    uint8_t kind;          /* dss_operation_kind_t */
    uint8_t dtype;         /* dss_dtype_t */
    uint8_t reduction;     /* dss_reduction_t */
    uint32_t member_count; /* at least 1 */
    uint64_t element_count;
    uint64_t members_hash;
    uint64_t layout; /* the caller's hash of what the elements are: sizes of tensors, names */
} dss_signature_t;

/* Layout: 0 u8 kind | 1 u8 dtype | 2 u8 reduction | 3 u8 0 | 4 u32 member_count | 8 u64 element_count | 16 u64 members_hash |
 * 24 u64 layout | 32..63 0. */
void dss_signature_encode(const dss_signature_t *signature, uint8_t bytes[DSS_SIGNATURE_BYTES]);
/* DSS_ERR_CORRUPT for unknown kinds, dtypes and reductions, a member count of 0, reserved bytes set. */
dss_status_t dss_signature_decode(const uint8_t bytes[DSS_SIGNATURE_BYTES], dss_signature_t *signature_p, dss_error_t *error_p);

#endif
