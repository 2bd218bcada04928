#include "check.h"

#include "frame.h"

#define EPOCH 0xa1b2c3d4u

static const dss_frame_t samples[] = {
    {DSS_FRAME_OPEN,
     DSS_PHASE_REDUCE,
     DSS_SIGNATURE_BYTES,
     {0x0102030405060708u, 0x1112131415161718u, 0x21222324u, 0x25262728u},
     0,
     0},
    {DSS_FRAME_DATA, DSS_PHASE_REDUCE, 1, {1, 2, 3, 4}, 0, 0},
    {DSS_FRAME_DATA,
     DSS_PHASE_GATHER,
     DSS_FRAME_MAX_PAYLOAD_BYTES,
     {UINT64_MAX, UINT64_MAX, UINT32_MAX, UINT32_MAX},
     0x3132333435363738u,
     0},
    {DSS_FRAME_DATA, DSS_PHASE_GATHER, 16, {1, 2, 3, 4}, UINT64_MAX - 16, 0},
    {DSS_FRAME_FAIL, DSS_PHASE_REDUCE, 100, {5, 6, 7, 8}, 0, 0},
    {DSS_FRAME_GOODBYE, DSS_PHASE_REDUCE, 0, {0, 0, 0, 0}, 0, 0},
    {DSS_FRAME_PING, DSS_PHASE_REDUCE, 0, {0, 0, 0, 0}, 0, 0},
    {DSS_FRAME_PONG, DSS_PHASE_REDUCE, 0, {0, 0, 0, 0}, 0, 0},
    {DSS_FRAME_BOARD, DSS_PHASE_GATHER, DSS_BOARD_SLOT_BYTES, {1, 2, 3, 4}, 1 << 20, DSS_BOARD_SLOTS - 1},
    {DSS_FRAME_SEEN, DSS_PHASE_REDUCE, 0, {0, 0, 0, 0}, 0, 0},
};
#define SAMPLE_COUNT (sizeof samples / sizeof *samples)

/* Whatever the bytes: refused with a text and nothing put out, or a frame that encodes to these very bytes. Returns which. */
static int frame_accepted(const uint8_t bytes[DSS_FRAME_BYTES], dss_error_t *error) {
    dss_frame_t frame;
    dss_frame_t untouched;
    uint8_t again[DSS_FRAME_BYTES];
    memset(&frame, 0x5a, sizeof frame);
    memset(&untouched, 0x5a, sizeof untouched);
    *error = (dss_error_t){DSS_OK, ""};
    const dss_status_t status = dss_frame_decode(bytes, EPOCH, &frame, error);
    CHECK_STATUS(dss_frame_decode(bytes, EPOCH, &frame, NULL), status);
    if (status == DSS_OK) {
        dss_frame_encode(&frame, EPOCH, again);
        CHECK_FOR(memcmp(again, bytes, sizeof again) == 0, "type %d", (int)frame.type);
        return 1;
    }
    CHECK_STATUS(status, DSS_ERR_CORRUPT);
    CHECK_STATUS(error->status, DSS_ERR_CORRUPT);
    CHECK_CONTAINS(error->text, "frame: ");
    CHECK(memcmp(&frame, &untouched, sizeof frame) == 0);
    return 0;
}

/* Other releases and machines read this form. */
static void the_form_is_fixed(void) {
    static const uint8_t expected[DSS_FRAME_BYTES] = {
        'd',  's',  's',  'F',  3,    2,    1,    0,    0xd4, 0xc3, 0xb2, 0xa1, 0x00, 0x00, 0x10, 0x00,
        0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11,
        0x24, 0x23, 0x22, 0x21, 0x28, 0x27, 0x26, 0x25, 0x38, 0x37, 0x36, 0x35, 0x34, 0x33, 0x32, 0x31,
    };
    static const dss_frame_t frame = {DSS_FRAME_DATA,
                                      DSS_PHASE_GATHER,
                                      DSS_FRAME_MAX_PAYLOAD_BYTES,
                                      {0x0102030405060708u, 0x1112131415161718u, 0x21222324u, 0x25262728u},
                                      0x3132333435363738u,
                                      0};
    uint8_t bytes[DSS_FRAME_BYTES];
    memset(bytes, 0xff, sizeof bytes);
    dss_frame_encode(&frame, EPOCH, bytes);
    CHECK(memcmp(bytes, expected, sizeof bytes) == 0);
}

static void frames_come_back_as_they_were(void) {
    for (size_t i = 0; i < SAMPLE_COUNT; i++) {
        uint8_t bytes[DSS_FRAME_BYTES];
        dss_frame_t frame;
        dss_frame_encode(&samples[i], EPOCH, bytes);
        CHECK_STATUS(dss_frame_decode(bytes, EPOCH, &frame, NULL), DSS_OK);
        CHECK_EQUAL(frame.type, samples[i].type);
        CHECK_EQUAL(frame.phase, samples[i].phase);
        CHECK_EQUAL(frame.payload_bytes, samples[i].payload_bytes);
        CHECK_EQUAL(frame.key.channel, samples[i].key.channel);
        CHECK_EQUAL(frame.key.sequence, samples[i].key.sequence);
        CHECK_EQUAL(frame.key.part, samples[i].key.part);
        CHECK_EQUAL(frame.key.stage, samples[i].key.stage);
        CHECK_EQUAL(frame.offset, samples[i].offset);
        CHECK_EQUAL(frame.slot, samples[i].slot);
    }
}

static void each_wrong_field_is_named(void) {
    static const struct {
        size_t sample;
        size_t at;
        uint8_t value;
        const char *text;
    } cases[] = {
        {0, 0, 'x', "begins with 78737346"},
        {0, 4, 1, "version 1, expected 3"},
        {0, 5, 0, "type 0 is unknown"},
        {0, 5, 9, "type 9 is unknown"},
        {8, 6, 0, "phase 0 on a board"},
        {8, 12, 1, "payload of 65537 bytes in a frame of type 7, expected 1 to 65536"},
        {8, 14, 0, "payload of 0 bytes"},
        {8, 48, 32, "slot 32 in a frame of type 7"},
        {8, 51, 1, "slot 16777247"},
        {1, 48, 1, "slot 1 in a frame of type 2"},
        {1, 6, 2, "phase 2"},
        {0, 6, 1, "phase 1 in a frame of type 1"},
        {4, 6, 1, "phase 1 in a frame of type 3"},
        {5, 6, 1, "phase 1 in a frame of type 4"},
        {0, 7, 1, "reserved"},
        {0, 8, 0xd5, "epoch a1b2c3d5, expected a1b2c3d4"},
        {0, 11, 0, "epoch 00b2c3d4"},
        {0, 12, 63, "payload of 63 bytes in a frame of type 1, expected 64 to 64"},
        {0, 12, 65, "payload of 65 bytes"},
        {2, 12, 1, "payload of 1048577 bytes"},
        {1, 15, 0x80, "payload of 2147483649 bytes"},
        {4, 12, 0, "payload of 0 bytes"},
        {5, 12, 1, "payload of 1 bytes"},
        {5, 16, 1, "key 1/0/0/0 in a frame of type 4"},
        {5, 24, 1, "key 0/1/0/0 in a frame of type 4"},
        {5, 32, 1, "key 0/0/1/0 in a frame of type 4"},
        {5, 36, 1, "key 0/0/0/1 in a frame of type 4"},
        {6, 12, 1, "payload of 1 bytes"},
        {7, 24, 1, "key 0/1/0/0 in a frame of type 6"},
        {0, 63, 1, "reserved"},
        {0, 40, 1, "offset 1 in a frame of type 1"},
        {4, 47, 1, "offset 72057594037927936 in a frame of type 3"},
        {3, 40, 0xf0, "overflow"}, /* the greatest that fits is 0xef, the sample's */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t bytes[DSS_FRAME_BYTES];
        dss_error_t error;
        dss_frame_encode(&samples[cases[i].sample], EPOCH, bytes);
        CHECK(frame_accepted(bytes, &error));
        bytes[cases[i].at] = cases[i].value;
        CHECK_FOR(!frame_accepted(bytes, &error), "byte %zu = %u of sample %zu", cases[i].at, cases[i].value, cases[i].sample);
        CHECK_CONTAINS(error.text, cases[i].text);
    }
}

/* One field at a time, every value of every byte. */
static void a_damaged_frame_is_refused_or_means_what_it_says(void) {
    for (size_t i = 0; i < SAMPLE_COUNT; i++)
        for (size_t at = 0; at < DSS_FRAME_BYTES; at++)
            for (unsigned value = 0; value < 256; value++) {
                uint8_t bytes[DSS_FRAME_BYTES];
                dss_error_t error;
                dss_frame_encode(&samples[i], EPOCH, bytes);
                const int changed = bytes[at] != value;
                bytes[at] = (uint8_t)value;
                const int accepted = frame_accepted(bytes, &error);
                if (at < 5 || at == 7 || (at >= 8 && at < 12))
                    CHECK_FOR(accepted == !changed, "byte %zu = %u of sample %zu", at, value, i);
            }
}

static void random_bytes_are_refused_or_mean_what_they_say(void) {
    uint64_t chance = 3;
    unsigned accepted = 0;
    for (unsigned round = 0; round < 200000; round++) {
        uint8_t bytes[DSS_FRAME_BYTES];
        dss_error_t error;
        dss_frame_encode(&samples[0], EPOCH, bytes);
        const size_t from = round % 4 ? 5 : 0; /* most of them with a good beginning, or none would come far */
        for (size_t at = from; at < sizeof bytes; at++)
            if (check_random_below(&chance, 8) == 0)
                bytes[at] = (uint8_t)(check_random_below(&chance, 2) ? check_random(&chance) : check_random_below(&chance, 5));
        accepted += (unsigned)frame_accepted(bytes, &error);
    }
    CHECK_FOR(accepted > 1000 && accepted < 100000, "%u accepted", accepted);
}

/* ---- signatures --------------------------------------------------------------------------------------------------------- */

static const dss_signature_t signature_sample = {
    DSS_OPERATION_ALL_REDUCE, DSS_INT64, DSS_BXOR, 0x01020304u, 0x1112131415161718u, 0x2122232425262728u, 0x3132333435363738u,
};

static int signature_accepted(const uint8_t bytes[DSS_SIGNATURE_BYTES], dss_error_t *error) {
    dss_signature_t signature;
    uint8_t again[DSS_SIGNATURE_BYTES];
    *error = (dss_error_t){DSS_OK, ""};
    const dss_status_t status = dss_signature_decode(bytes, &signature, error);
    if (status == DSS_OK) {
        dss_signature_encode(&signature, again);
        CHECK(memcmp(again, bytes, sizeof again) == 0);
        return 1;
    }
    CHECK_STATUS(status, DSS_ERR_CORRUPT);
    CHECK_CONTAINS(error->text, "signature: ");
    return 0;
}

static void the_form_of_a_signature_is_fixed(void) {
    static const uint8_t expected[DSS_SIGNATURE_BYTES] = {
        2,    7,    6,    0,    0x04, 0x03, 0x02, 0x01, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11,
        0x28, 0x27, 0x26, 0x25, 0x24, 0x23, 0x22, 0x21, 0x38, 0x37, 0x36, 0x35, 0x34, 0x33, 0x32, 0x31,
    };
    uint8_t bytes[DSS_SIGNATURE_BYTES];
    memset(bytes, 0xff, sizeof bytes);
    dss_signature_encode(&signature_sample, bytes);
    CHECK(memcmp(bytes, expected, sizeof bytes) == 0);
}

static void signatures_come_back_as_they_were(void) {
    uint8_t bytes[DSS_SIGNATURE_BYTES];
    dss_signature_t signature;
    dss_signature_encode(&signature_sample, bytes);
    CHECK_STATUS(dss_signature_decode(bytes, &signature, NULL), DSS_OK);
    CHECK_EQUAL(signature.kind, signature_sample.kind);
    CHECK_EQUAL(signature.dtype, signature_sample.dtype);
    CHECK_EQUAL(signature.reduction, signature_sample.reduction);
    CHECK_EQUAL(signature.member_count, signature_sample.member_count);
    CHECK_EQUAL(signature.element_count, signature_sample.element_count);
    CHECK_EQUAL(signature.members_hash, signature_sample.members_hash);
    CHECK_EQUAL(signature.layout, signature_sample.layout);
}

/* What each byte may hold in a sample whose member count is 0x01020304; all else is refused. */
static void each_byte_of_a_signature_is_checked(void) {
    for (size_t at = 0; at < DSS_SIGNATURE_BYTES; at++)
        for (unsigned value = 0; value < 256; value++) {
            uint8_t bytes[DSS_SIGNATURE_BYTES];
            dss_error_t error;
            int allowed = at < 32 || value == 0;
            if (at == 0)
                allowed = value >= 1 && value <= 5;
            else if (at == 1)
                allowed = value <= 7;
            else if (at == 2)
                allowed = value <= 6;
            else if (at == 3)
                allowed = value == 0;
            dss_signature_encode(&signature_sample, bytes);
            bytes[at] = (uint8_t)value;
            CHECK_FOR(signature_accepted(bytes, &error) == allowed, "byte %zu = %u: %s", at, value, error.text);
        }
}

static void an_operation_without_members_is_refused(void) {
    uint8_t bytes[DSS_SIGNATURE_BYTES];
    dss_error_t error;
    dss_signature_encode(&signature_sample, bytes);
    memset(bytes + 4, 0, 4);
    CHECK(!signature_accepted(bytes, &error));
    CHECK_CONTAINS(error.text, "member count 0");
}

int main(void) {
    RUN(the_form_is_fixed);
    RUN(frames_come_back_as_they_were);
    RUN(each_wrong_field_is_named);
    RUN(a_damaged_frame_is_refused_or_means_what_it_says);
    RUN(random_bytes_are_refused_or_mean_what_they_say);
    RUN(the_form_of_a_signature_is_fixed);
    RUN(signatures_come_back_as_they_were);
    RUN(each_byte_of_a_signature_is_checked);
    RUN(an_operation_without_members_is_refused);
}
