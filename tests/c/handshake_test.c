#include "check.h"

#include "handshake.h"

#define SECRET "a secret of 32 bytes, printable!"
#define EPOCH 0x0102030405060708u
#define MESSAGE_COUNT 4u
#define DIALER_RANK 3u
#define ACCEPTOR_RANK 5u
#define WORLD_SIZE 8u

typedef uint8_t message_t[DSS_HANDSHAKE_MESSAGE_BYTES];

/* One connection. The machines point at the identities, so it must stay where it is. */
typedef struct conversation {
    dss_identity_t dialer_identity;
    dss_identity_t acceptor_identity;
    uint8_t dialer_nonce[DSS_NONCE_BYTES];
    uint8_t acceptor_nonce[DSS_NONCE_BYTES];
    dss_way_t way;
    dss_handshake_t dialer;
    dss_handshake_t acceptor;
    message_t messages[MESSAGE_COUNT]; /* those that were sent */
} conversation_t;

static void fill(uint8_t *nonce, uint8_t first) {
    for (unsigned i = 0; i < DSS_NONCE_BYTES; i++)
        nonce[i] = (uint8_t)(first + i);
}

static void prepare(conversation_t *talk) {
    memset(talk, 0, sizeof *talk);
    talk->dialer_identity = (dss_identity_t){.epoch = EPOCH, .rank = DIALER_RANK, .world_size = WORLD_SIZE};
    memcpy(talk->dialer_identity.secret, SECRET, DSS_SECRET_BYTES);
    talk->acceptor_identity = talk->dialer_identity;
    talk->acceptor_identity.rank = ACCEPTOR_RANK;
    fill(talk->dialer_nonce, 0x10);
    fill(talk->acceptor_nonce, 0x20);
}

/* Whose turn it is to take message `number`. */
static dss_handshake_t *receiver(conversation_t *talk, unsigned number) {
    return number % 2 ? &talk->dialer : &talk->acceptor;
}

static dss_status_t deliver(conversation_t *talk, unsigned number, dss_error_t *error) {
    message_t answer = {0};
    bool answered = false;
    const dss_status_t status = dss_handshake_step(receiver(talk, number), talk->messages[number], answer, &answered, error);
    if (status == DSS_OK) {
        CHECK_EQUAL(answered, number < 2);
        if (answered)
            memcpy(talk->messages[number + 1], answer, sizeof answer);
    }
    return status;
}

/* Everything goes well up to message `number`, which is sent but not delivered yet. */
static void run_up_to(conversation_t *talk, unsigned number, dss_verdict_t verdict) {
    dss_handshake_dial(&talk->dialer, &talk->dialer_identity, talk->acceptor_identity.rank, talk->way, talk->dialer_nonce,
                       talk->messages[0]);
    dss_handshake_accept(&talk->acceptor, &talk->acceptor_identity, talk->acceptor_nonce);
    for (unsigned i = 0; i < number && i < 3; i++)
        CHECK_STATUS(deliver(talk, i, NULL), DSS_OK);
    if (number >= 3)
        dss_handshake_decide(&talk->acceptor, verdict, talk->messages[3]);
}

/* `machine` refuses `message` for good, says why, answers nothing and tells no secret. */
static void check_refused(dss_handshake_t *machine, const message_t message, dss_status_t expected, const char *text) {
    message_t answer;
    message_t untouched;
    bool answered = true;
    dss_error_t error = {DSS_OK, ""};
    char hex[9];
    memset(answer, 0x5a, sizeof answer);
    memset(untouched, 0x5a, sizeof untouched);
    const dss_status_t status = dss_handshake_step(machine, message, answer, &answered, &error);
    CHECK_FOR(status == expected || (expected == DSS_OK && (status == DSS_ERR_CORRUPT || status == DSS_ERR_STRANGER)),
              "'%s', expected '%s': %s", dss_status_string(status), dss_status_string(expected), error.text);
    CHECK_STATUS(error.status, status);
    CHECK_CONTAINS(error.text, "handshake: ");
    CHECK_CONTAINS(error.text, text);
    CHECK_EQUAL(machine->state, DSS_HANDSHAKE_FAILED);
    CHECK(!answered && memcmp(answer, untouched, sizeof answer) == 0);
    for (unsigned i = 0; i + 4 <= DSS_SECRET_BYTES; i++) {
        snprintf(hex, sizeof hex, "%02x%02x%02x%02x", SECRET[i], SECRET[i + 1], SECRET[i + 2], SECRET[i + 3]);
        CHECK_FOR(!strstr(error.text, hex), "%s", error.text);
    }
    CHECK_FOR(!strstr(error.text, "printable"), "%s", error.text);
    CHECK_STATUS(dss_handshake_step(machine, message, answer, &answered, NULL), DSS_ERR_CORRUPT); /* and stays so */
    CHECK_EQUAL(machine->state, DSS_HANDSHAKE_FAILED);
}

static void two_ranks_meet(void) {
    for (int verdict = DSS_VERDICT_WELCOME; verdict <= DSS_VERDICT_LEAVING; verdict++) {
        conversation_t talk;
        prepare(&talk);
        talk.way = verdict % 2 ? DSS_WAY_FORTH : DSS_WAY_BACK;
        run_up_to(&talk, 0, DSS_VERDICT_NONE);
        CHECK_EQUAL(talk.dialer.state, DSS_HANDSHAKE_DIALER_CHALLENGE);
        CHECK_EQUAL(talk.dialer.peer, ACCEPTOR_RANK);
        CHECK_EQUAL(talk.acceptor.state, DSS_HANDSHAKE_ACCEPTOR_HELLO);
        CHECK_STATUS(deliver(&talk, 0, NULL), DSS_OK);
        CHECK_EQUAL(talk.acceptor.state, DSS_HANDSHAKE_ACCEPTOR_PROOF);
        CHECK_EQUAL(talk.acceptor.peer, DIALER_RANK);
        CHECK_STATUS(deliver(&talk, 1, NULL), DSS_OK);
        CHECK_EQUAL(talk.dialer.state, DSS_HANDSHAKE_DIALER_VERDICT);
        CHECK_STATUS(deliver(&talk, 2, NULL), DSS_OK);
        CHECK_EQUAL(talk.acceptor.state, DSS_HANDSHAKE_ACCEPTOR_DECIDE);
        dss_handshake_decide(&talk.acceptor, (dss_verdict_t)verdict, talk.messages[3]);
        CHECK_EQUAL(talk.acceptor.state, DSS_HANDSHAKE_DONE);
        CHECK_STATUS(deliver(&talk, 3, NULL), DSS_OK);
        CHECK_EQUAL(talk.dialer.state, DSS_HANDSHAKE_DONE);
        CHECK_EQUAL(talk.acceptor.way, talk.way);
        CHECK_EQUAL(talk.dialer.verdict, verdict);
        CHECK_EQUAL(talk.acceptor.verdict, verdict);
        check_refused(&talk.dialer, talk.messages[3], DSS_ERR_CORRUPT, "none is due");
    }
}

/* As another implementation of HMAC-SHA-256 makes them: ranks of other releases must agree. */
static void the_form_is_fixed(void) {
    static const message_t expected[MESSAGE_COUNT] = {
        {0x64, 0x73, 0x73, 0x48, 0x02, 0x01, 0x00, 0x00, 0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01,
         0x03, 0x00, 0x00, 0x00, 0x05, 0x00, 0x00, 0x00, 0x08, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00,
         0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f,
         0xd9, 0xa4, 0xf2, 0xbd, 0xcf, 0xa0, 0xfd, 0x8b, 0x02, 0xe0, 0xfd, 0x33, 0xa2, 0xa5, 0xe2, 0x10},
        {0x64, 0x73, 0x73, 0x48, 0x02, 0x02, 0x00, 0x00, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27,
         0x28, 0x29, 0x2a, 0x2b, 0x2c, 0x2d, 0x2e, 0x2f, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
         0x96, 0x11, 0x06, 0x9f, 0x2c, 0xf2, 0x47, 0xab, 0xf4, 0xfd, 0x51, 0xf6, 0xfc, 0x06, 0xdb, 0x96,
         0x9f, 0x8a, 0x23, 0xd6, 0x34, 0x04, 0xeb, 0xf2, 0x66, 0xdc, 0x7b, 0xe4, 0xd9, 0x3e, 0xfa, 0x3b},
        {0x64, 0x73, 0x73, 0x48, 0x02, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
         0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
         0xe6, 0xba, 0x19, 0x41, 0xb8, 0x96, 0x79, 0x96, 0x23, 0xfa, 0xad, 0x92, 0x78, 0x1a, 0x23, 0x0a,
         0x48, 0x31, 0x82, 0xd0, 0x41, 0x98, 0x65, 0x6f, 0x8d, 0xee, 0x9e, 0x15, 0x1d, 0xf2, 0x88, 0x07},
        {0x64, 0x73, 0x73, 0x48, 0x02, 0x04, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
         0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
         0x02, 0xf5, 0xd6, 0xb1, 0x2e, 0x10, 0x50, 0xb1, 0x7b, 0x04, 0xa1, 0xb5, 0x3a, 0x3b, 0x13, 0x75,
         0x36, 0x8b, 0xa8, 0x7f, 0xd6, 0x8a, 0xc0, 0x81, 0x3d, 0x0b, 0x64, 0xda, 0xf6, 0x39, 0xdd, 0xd0},
    };
    conversation_t talk;
    prepare(&talk);
    talk.way = DSS_WAY_BACK;
    run_up_to(&talk, 3, DSS_VERDICT_DUPLICATE);
    for (unsigned i = 0; i < MESSAGE_COUNT; i++)
        CHECK_FOR(memcmp(talk.messages[i], expected[i], sizeof expected[i]) == 0, "message %u", i);
}

static void every_flipped_bit_ends_it(void) {
    for (unsigned number = 0; number < MESSAGE_COUNT; number++)
        for (unsigned bit = 0; bit < 8 * DSS_HANDSHAKE_MESSAGE_BYTES; bit++) {
            conversation_t talk;
            prepare(&talk);
            run_up_to(&talk, number, DSS_VERDICT_WELCOME);
            talk.messages[number][bit / 8] ^= (uint8_t)(1u << bit % 8);
            check_refused(receiver(&talk, number), talk.messages[number], DSS_OK, "");
        }
}

static void bytes_that_are_no_message_are_corrupt(void) {
    static const struct {
        unsigned at;
        uint8_t value;
        const char *text;
    } cases[] = {
        {0, 'G', "begins with 47737348"}, {4, 1, "version 1, this rank speaks 2"}, {5, 9, "message 9 where"}, {6, 1, "reserved"}};
    for (unsigned number = 0; number < MESSAGE_COUNT; number++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            conversation_t talk;
            prepare(&talk);
            run_up_to(&talk, number, DSS_VERDICT_WELCOME);
            talk.messages[number][cases[i].at] = cases[i].value;
            check_refused(receiver(&talk, number), talk.messages[number], DSS_ERR_CORRUPT, cases[i].text);
        }
}

static void a_message_out_of_its_turn_is_corrupt(void) {
    conversation_t whole;
    prepare(&whole);
    run_up_to(&whole, 3, DSS_VERDICT_WELCOME);
    for (unsigned turn = 0; turn < MESSAGE_COUNT; turn++)
        for (unsigned sent = 0; sent < MESSAGE_COUNT; sent++) {
            conversation_t talk;
            prepare(&talk);
            run_up_to(&talk, turn, DSS_VERDICT_WELCOME);
            if (sent != turn)
                check_refused(receiver(&talk, turn), whole.messages[sent], DSS_ERR_CORRUPT, "is due");
        }
    conversation_t talk;
    prepare(&talk);
    run_up_to(&talk, 2, DSS_VERDICT_NONE);
    CHECK_STATUS(deliver(&talk, 2, NULL), DSS_OK);
    check_refused(&talk.acceptor, talk.messages[2], DSS_ERR_CORRUPT, "none is due"); /* in DECIDE */
}

static void who_is_not_of_the_job_is_a_stranger(void) {
    conversation_t talk;
    prepare(&talk);
    talk.dialer_identity.epoch++;
    run_up_to(&talk, 0, DSS_VERDICT_NONE);
    check_refused(&talk.acceptor, talk.messages[0], DSS_ERR_STRANGER, "epoch 0102030405060709");

    prepare(&talk);
    talk.dialer_identity.world_size = 9;
    run_up_to(&talk, 0, DSS_VERDICT_NONE);
    check_refused(&talk.acceptor, talk.messages[0], DSS_ERR_STRANGER, "9 ranks, this one has 8");

    prepare(&talk);
    talk.dialer_identity.rank = WORLD_SIZE;
    run_up_to(&talk, 0, DSS_VERDICT_NONE);
    check_refused(&talk.acceptor, talk.messages[0], DSS_ERR_STRANGER, "rank 8 in a job of 8");

    prepare(&talk);
    talk.dialer_identity.rank = ACCEPTOR_RANK;
    run_up_to(&talk, 0, DSS_VERDICT_NONE);
    check_refused(&talk.acceptor, talk.messages[0], DSS_ERR_STRANGER, "rank 5 was called by its own number");

    prepare(&talk);
    run_up_to(&talk, 0, DSS_VERDICT_NONE);
    dss_handshake_dial(&talk.dialer, &talk.dialer_identity, 6, DSS_WAY_FORTH, talk.dialer_nonce, talk.messages[0]);
    check_refused(&talk.acceptor, talk.messages[0], DSS_ERR_STRANGER, "for rank 6 reached rank 5");
}

/* Both roles, since either may be the stranger: the acceptor finds out at HELLO, the dialer at CHALLENGE. */
static void another_secret_is_a_stranger_s(void) {
    conversation_t talk;
    conversation_t foreign;
    for (unsigned bit = 0; bit < 8 * DSS_SECRET_BYTES; bit += 13) {
        prepare(&foreign);
        foreign.dialer_identity.secret[bit / 8] ^= (uint8_t)(1u << bit % 8);
        foreign.acceptor_identity.secret[bit / 8] ^= (uint8_t)(1u << bit % 8);
        run_up_to(&foreign, 3, DSS_VERDICT_WELCOME);
        for (unsigned number = 0; number < MESSAGE_COUNT; number++) {
            prepare(&talk);
            run_up_to(&talk, number, DSS_VERDICT_WELCOME);
            check_refused(receiver(&talk, number), foreign.messages[number], DSS_ERR_STRANGER, "does not have this job's secret");
        }
    }
}

/* The attacker has recorded a whole conversation and plays either side again to the other, whose nonce is a new one. */
static void a_recording_is_worth_nothing(void) {
    conversation_t recorded;
    conversation_t talk;
    prepare(&recorded);
    run_up_to(&recorded, 3, DSS_VERDICT_WELCOME);

    prepare(&talk);
    fill(talk.acceptor_nonce, 0x80);
    run_up_to(&talk, 0, DSS_VERDICT_NONE);
    memcpy(talk.messages[0], recorded.messages[0], sizeof(message_t));
    CHECK_STATUS(deliver(&talk, 0, NULL), DSS_OK); /* a true rank did say this, if not now */
    check_refused(&talk.acceptor, recorded.messages[2], DSS_ERR_STRANGER, "replayed");

    for (unsigned number = 1; number < MESSAGE_COUNT; number++) { /* CHALLENGE to a dialer, PROOF to an acceptor, VERDICT */
        prepare(&talk);
        fill(talk.dialer_nonce, 0x80);
        run_up_to(&talk, number, DSS_VERDICT_WELCOME);
        check_refused(receiver(&talk, number), recorded.messages[number], DSS_ERR_STRANGER, "replayed");
    }
}

/* The same ranks, the same nonces, the other direction. */
static void one_direction_is_of_no_use_to_the_other(void) {
    conversation_t reverse;
    prepare(&reverse);
    reverse.dialer_identity.rank = ACCEPTOR_RANK;
    reverse.acceptor_identity.rank = DIALER_RANK;
    run_up_to(&reverse, 3, DSS_VERDICT_WELCOME);
    for (unsigned number = 0; number < MESSAGE_COUNT; number++) {
        conversation_t talk;
        prepare(&talk);
        run_up_to(&talk, number, DSS_VERDICT_WELCOME);
        check_refused(receiver(&talk, number), reverse.messages[number], DSS_ERR_STRANGER, "");
    }
}

/* The same ranks and nonces, the other one of two connections. */
static void one_way_is_of_no_use_to_the_other(void) {
    conversation_t back;
    prepare(&back);
    back.way = DSS_WAY_BACK;
    run_up_to(&back, 3, DSS_VERDICT_WELCOME);
    conversation_t talk;
    for (unsigned number = 1; number < MESSAGE_COUNT; number++) {
        prepare(&talk);
        run_up_to(&talk, number, DSS_VERDICT_WELCOME);
        check_refused(receiver(&talk, number), back.messages[number], DSS_ERR_STRANGER, "");
    }
    prepare(&talk);
    run_up_to(&talk, 0, DSS_VERDICT_NONE);
    talk.messages[0][28] = DSS_WAY_BACK;
    check_refused(&talk.acceptor, talk.messages[0], DSS_ERR_STRANGER, "");
    prepare(&talk);
    run_up_to(&talk, 0, DSS_VERDICT_NONE);
    talk.messages[0][28] = DSS_WAY_BACK + 1;
    check_refused(&talk.acceptor, talk.messages[0], DSS_ERR_CORRUPT, "way 2 is unknown");
}

/* An attacker without the secret, who sends back what it was sent, in the envelope that is due. */
static void a_mac_sent_back_proves_nothing(void) {
    for (unsigned source = 0; source < MESSAGE_COUNT; source++)
        for (unsigned number = 1; number < MESSAGE_COUNT; number++) {
            conversation_t talk;
            message_t forged;
            prepare(&talk);
            fill(talk.acceptor_nonce, 0x10); /* of equal nonces only the label tells the sides apart */
            run_up_to(&talk, 3, DSS_VERDICT_WELCOME);
            memcpy(forged, talk.messages[number], sizeof forged);
            memcpy(forged + 32, talk.messages[source] + 32, 32);
            run_up_to(&talk, number, DSS_VERDICT_WELCOME);
            if (source != number)
                check_refused(receiver(&talk, number), forged, DSS_ERR_STRANGER, "secret");
        }
    conversation_t talk;
    prepare(&talk);
    run_up_to(&talk, 0, DSS_VERDICT_NONE);
    dss_handshake_accept(&talk.acceptor, &talk.dialer_identity, talk.acceptor_nonce); /* the dialer's own door */
    check_refused(&talk.acceptor, talk.messages[0], DSS_ERR_STRANGER, "");
}

static void a_verdict_cannot_be_turned_into_another(void) {
    conversation_t talk;
    prepare(&talk);
    run_up_to(&talk, 3, DSS_VERDICT_LEAVING);
    talk.messages[3][8] = DSS_VERDICT_WELCOME;
    check_refused(&talk.dialer, talk.messages[3], DSS_ERR_STRANGER, "");
    CHECK_EQUAL(talk.dialer.verdict, DSS_VERDICT_NONE);
    prepare(&talk);
    run_up_to(&talk, 3, DSS_VERDICT_LEAVING);
    talk.messages[3][8] = DSS_VERDICT_LEAVING + 1;
    check_refused(&talk.dialer, talk.messages[3], DSS_ERR_CORRUPT, "verdict 4 is unknown");
}

static void no_verdict_for_who_is_not_proved(void) {
    static const message_t zeros;
    for (unsigned number = 0; number < 3; number++) {
        conversation_t talk;
        prepare(&talk);
        run_up_to(&talk, number, DSS_VERDICT_NONE);
        memset(talk.messages[3], 0x5a, sizeof(message_t));
        dss_handshake_decide(&talk.acceptor, DSS_VERDICT_WELCOME, talk.messages[3]);
        CHECK_EQUAL(talk.acceptor.state, DSS_HANDSHAKE_FAILED);
        CHECK(memcmp(talk.messages[3], zeros, sizeof zeros) == 0);
    }
}

int main(void) {
    RUN(two_ranks_meet);
    RUN(the_form_is_fixed);
    RUN(every_flipped_bit_ends_it);
    RUN(bytes_that_are_no_message_are_corrupt);
    RUN(a_message_out_of_its_turn_is_corrupt);
    RUN(who_is_not_of_the_job_is_a_stranger);
    RUN(another_secret_is_a_stranger_s);
    RUN(a_recording_is_worth_nothing);
    RUN(one_direction_is_of_no_use_to_the_other);
    RUN(one_way_is_of_no_use_to_the_other);
    RUN(a_mac_sent_back_proves_nothing);
    RUN(a_verdict_cannot_be_turned_into_another);
    RUN(no_verdict_for_who_is_not_proved);
}
