#include "handshake.h"

#include <inttypes.h>
#include <string.h>

#include "bytes.h"
#include "sha256.h"

#define VERSION 2u
#define WAY_AT 28u
#define HELLO_NONCE_AT 32u
#define HELLO_MAC_AT 48u
#define HELLO_MAC_BYTES 16u
#define CHALLENGE_NONCE_AT 8u
#define VERDICT_AT 8u
#define MAC_AT 32u
#define LABEL_BYTES 24u
#define COVERED_BYTES 84u

typedef enum message_type { HELLO = 1, CHALLENGE = 2, PROOF = 3, VERDICT = 4 } message_type_t;

static const uint8_t magic[4] = {'d', 's', 's', 'H'};

static const char labels[][LABEL_BYTES] = {"", "dssync 2 hello", "dssync 2 challenge", "dssync 2 proof", "dssync 2 verdict"};

/* Of the ranks `from`, who dialed, and `to`, who accepted. */
static void make_mac(const dss_handshake_t *handshake, message_type_t type, uint32_t from, uint32_t to, dss_verdict_t verdict,
                     uint8_t mac[DSS_SHA256_BYTES]) {
    const dss_identity_t *identity = handshake->identity;
    uint8_t covered[COVERED_BYTES] = {0};
    dss_hmac_t hmac;
    memcpy(covered, labels[type], LABEL_BYTES);
    dss_put_u64(covered + 24, identity->epoch);
    dss_put_u32(covered + 32, from);
    dss_put_u32(covered + 36, to);
    dss_put_u32(covered + 40, identity->world_size);
    dss_put_u32(covered + 44, (uint32_t)verdict);
    memcpy(covered + 48, handshake->dialer_nonce, DSS_NONCE_BYTES);
    if (type != HELLO)
        memcpy(covered + 64, handshake->acceptor_nonce, DSS_NONCE_BYTES);
    dss_put_u32(covered + 80, (uint32_t)handshake->way);
    dss_hmac_begin(&hmac, identity->secret, sizeof identity->secret);
    dss_hmac_more(&hmac, covered, sizeof covered);
    dss_hmac_end(&hmac, mac);
}

static void make_dialer_mac(const dss_handshake_t *handshake, message_type_t type, dss_verdict_t verdict,
                            uint8_t mac[DSS_SHA256_BYTES]) {
    make_mac(handshake, type, handshake->identity->rank, handshake->peer, verdict, mac);
}

static void make_acceptor_mac(const dss_handshake_t *handshake, message_type_t type, dss_verdict_t verdict,
                              uint8_t mac[DSS_SHA256_BYTES]) {
    make_mac(handshake, type, handshake->peer, handshake->identity->rank, verdict, mac);
}

static void begin_message(uint8_t *message, message_type_t type) {
    memset(message, 0, DSS_HANDSHAKE_MESSAGE_BYTES);
    memcpy(message, magic, sizeof magic);
    message[4] = VERSION;
    message[5] = (uint8_t)type;
}

/* Bytes [8, fields_end) and those from `tail` on are the type's own. */
static dss_status_t check_message(const uint8_t *message, message_type_t type, size_t fields_end, size_t tail,
                                  dss_error_t *error_p) {
    if (memcmp(message, magic, sizeof magic) != 0)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "handshake: begins with %02x%02x%02x%02x, no dssync rank does", message[0],
                        message[1], message[2], message[3]);
    if (message[4] != VERSION)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "handshake: version %u, this rank speaks %u", message[4], VERSION);
    if (message[5] != type)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "handshake: message %u where %d is due", message[5], (int)type);
    if (!dss_bytes_zero(message, 6, 8) || !dss_bytes_zero(message, fields_end, tail))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "handshake: reserved bytes of message %d are not 0", (int)type);
    return DSS_OK;
}

static dss_status_t check_mac(const dss_handshake_t *handshake, const uint8_t *mac, const uint8_t *expected, size_t bytes_count,
                              dss_error_t *error_p) {
    if (dss_mac_equal(mac, expected, bytes_count))
        return DSS_OK;
    return dss_fail(error_p, DSS_ERR_STRANGER,
                    "handshake: who claims to be rank %" PRIu32
                    " does not have this job's secret, or its message was changed or replayed",
                    handshake->peer);
}

/* Who calls, and whether it means us. */
static dss_status_t check_caller(const dss_identity_t *identity, const uint8_t *message, dss_error_t *error_p) {
    const uint64_t epoch = dss_get_u64(message + 8);
    const uint32_t from = dss_get_u32(message + 16);
    const uint32_t to = dss_get_u32(message + 20);
    const uint32_t world_size = dss_get_u32(message + 24);
    if (epoch != identity->epoch)
        return dss_fail(error_p, DSS_ERR_STRANGER,
                        "handshake: a caller of epoch %016" PRIx64 ", another job's; this one's is %016" PRIx64, epoch,
                        identity->epoch);
    if (world_size != identity->world_size)
        return dss_fail(error_p, DSS_ERR_STRANGER, "handshake: a caller of a job of %" PRIu32 " ranks, this one has %" PRIu32,
                        world_size, identity->world_size);
    if (to != identity->rank)
        return dss_fail(error_p, DSS_ERR_STRANGER, "handshake: a call for rank %" PRIu32 " reached rank %" PRIu32, to,
                        identity->rank);
    if (from >= world_size)
        return dss_fail(error_p, DSS_ERR_STRANGER, "handshake: a caller of rank %" PRIu32 " in a job of %" PRIu32 " ranks", from,
                        world_size);
    if (from == identity->rank)
        return dss_fail(error_p, DSS_ERR_STRANGER, "handshake: rank %" PRIu32 " was called by its own number", from);
    return DSS_OK;
}

static dss_status_t take_hello(dss_handshake_t *handshake, const uint8_t *message, uint8_t *answer, dss_error_t *error_p) {
    uint8_t expected[DSS_SHA256_BYTES];
    dss_status_t status = check_message(message, HELLO, WAY_AT + 1, HELLO_NONCE_AT, error_p);
    if (status == DSS_OK)
        status = check_caller(handshake->identity, message, error_p);
    if (status != DSS_OK)
        return status;
    if (message[WAY_AT] > DSS_WAY_BACK)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "handshake: way %u is unknown", message[WAY_AT]);
    handshake->peer = dss_get_u32(message + 16);
    handshake->way = (dss_way_t)message[WAY_AT];
    memcpy(handshake->dialer_nonce, message + HELLO_NONCE_AT, DSS_NONCE_BYTES);
    make_acceptor_mac(handshake, HELLO, DSS_VERDICT_NONE, expected);
    status = check_mac(handshake, message + HELLO_MAC_AT, expected, HELLO_MAC_BYTES, error_p);
    dss_wipe(expected, sizeof expected);
    if (status != DSS_OK)
        return status;
    begin_message(answer, CHALLENGE);
    memcpy(answer + CHALLENGE_NONCE_AT, handshake->acceptor_nonce, DSS_NONCE_BYTES);
    make_acceptor_mac(handshake, CHALLENGE, DSS_VERDICT_NONE, answer + MAC_AT);
    handshake->state = DSS_HANDSHAKE_ACCEPTOR_PROOF;
    return DSS_OK;
}

static dss_status_t take_challenge(dss_handshake_t *handshake, const uint8_t *message, uint8_t *answer, dss_error_t *error_p) {
    uint8_t expected[DSS_SHA256_BYTES];
    dss_status_t status = check_message(message, CHALLENGE, CHALLENGE_NONCE_AT + DSS_NONCE_BYTES, MAC_AT, error_p);
    if (status != DSS_OK)
        return status;
    memcpy(handshake->acceptor_nonce, message + CHALLENGE_NONCE_AT, DSS_NONCE_BYTES);
    make_dialer_mac(handshake, CHALLENGE, DSS_VERDICT_NONE, expected);
    status = check_mac(handshake, message + MAC_AT, expected, sizeof expected, error_p);
    dss_wipe(expected, sizeof expected);
    if (status != DSS_OK)
        return status;
    begin_message(answer, PROOF);
    make_dialer_mac(handshake, PROOF, DSS_VERDICT_NONE, answer + MAC_AT);
    handshake->state = DSS_HANDSHAKE_DIALER_VERDICT;
    return DSS_OK;
}

static dss_status_t take_proof(dss_handshake_t *handshake, const uint8_t *message, dss_error_t *error_p) {
    uint8_t expected[DSS_SHA256_BYTES];
    dss_status_t status = check_message(message, PROOF, 8, MAC_AT, error_p);
    if (status != DSS_OK)
        return status;
    make_acceptor_mac(handshake, PROOF, DSS_VERDICT_NONE, expected);
    status = check_mac(handshake, message + MAC_AT, expected, sizeof expected, error_p);
    dss_wipe(expected, sizeof expected);
    if (status == DSS_OK)
        handshake->state = DSS_HANDSHAKE_ACCEPTOR_DECIDE;
    return status;
}

static dss_status_t take_verdict(dss_handshake_t *handshake, const uint8_t *message, dss_error_t *error_p) {
    uint8_t expected[DSS_SHA256_BYTES];
    const dss_verdict_t verdict = (dss_verdict_t)message[VERDICT_AT];
    dss_status_t status = check_message(message, VERDICT, VERDICT_AT + 1, MAC_AT, error_p);
    if (status != DSS_OK)
        return status;
    if (verdict < DSS_VERDICT_WELCOME || verdict > DSS_VERDICT_LEAVING)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "handshake: verdict %d is unknown", (int)verdict);
    make_dialer_mac(handshake, VERDICT, verdict, expected);
    status = check_mac(handshake, message + MAC_AT, expected, sizeof expected, error_p);
    dss_wipe(expected, sizeof expected);
    if (status != DSS_OK)
        return status;
    handshake->verdict = verdict;
    handshake->state = DSS_HANDSHAKE_DONE;
    return DSS_OK;
}

void dss_handshake_dial(dss_handshake_t *handshake, const dss_identity_t *identity, uint32_t peer, dss_way_t way,
                        const uint8_t nonce[DSS_NONCE_BYTES], uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES]) {
    uint8_t mac[DSS_SHA256_BYTES];
    *handshake = (dss_handshake_t){.identity = identity, .state = DSS_HANDSHAKE_DIALER_CHALLENGE, .peer = peer, .way = way};
    memcpy(handshake->dialer_nonce, nonce, DSS_NONCE_BYTES);
    begin_message(message, HELLO);
    dss_put_u64(message + 8, identity->epoch);
    dss_put_u32(message + 16, identity->rank);
    dss_put_u32(message + 20, peer);
    dss_put_u32(message + 24, identity->world_size);
    dss_put_u32(message + WAY_AT, (uint32_t)way);
    memcpy(message + HELLO_NONCE_AT, nonce, DSS_NONCE_BYTES);
    make_dialer_mac(handshake, HELLO, DSS_VERDICT_NONE, mac);
    memcpy(message + HELLO_MAC_AT, mac, HELLO_MAC_BYTES);
}

void dss_handshake_accept(dss_handshake_t *handshake, const dss_identity_t *identity, const uint8_t nonce[DSS_NONCE_BYTES]) {
    *handshake = (dss_handshake_t){.identity = identity, .state = DSS_HANDSHAKE_ACCEPTOR_HELLO};
    memcpy(handshake->acceptor_nonce, nonce, DSS_NONCE_BYTES);
}

dss_status_t dss_handshake_step(dss_handshake_t *handshake, const uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES],
                                uint8_t answer[DSS_HANDSHAKE_MESSAGE_BYTES], bool *answer_p, dss_error_t *error_p) {
    const dss_handshake_state_t state = handshake->state;
    dss_status_t status = DSS_OK;
    switch (state) {
    case DSS_HANDSHAKE_DIALER_CHALLENGE:
        status = take_challenge(handshake, message, answer, error_p);
        break;
    case DSS_HANDSHAKE_DIALER_VERDICT:
        status = take_verdict(handshake, message, error_p);
        break;
    case DSS_HANDSHAKE_ACCEPTOR_HELLO:
        status = take_hello(handshake, message, answer, error_p);
        break;
    case DSS_HANDSHAKE_ACCEPTOR_PROOF:
        status = take_proof(handshake, message, error_p);
        break;
    case DSS_HANDSHAKE_ACCEPTOR_DECIDE:
    case DSS_HANDSHAKE_DONE:
    case DSS_HANDSHAKE_FAILED:
        status = dss_fail(error_p, DSS_ERR_CORRUPT, "handshake: a message where none is due");
        break;
    }
    if (status != DSS_OK)
        handshake->state = DSS_HANDSHAKE_FAILED;
    *answer_p = status == DSS_OK && (state == DSS_HANDSHAKE_DIALER_CHALLENGE || state == DSS_HANDSHAKE_ACCEPTOR_HELLO);
    return status;
}

void dss_handshake_decide(dss_handshake_t *handshake, dss_verdict_t verdict, uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES]) {
    memset(message, 0, DSS_HANDSHAKE_MESSAGE_BYTES);
    if (handshake->state != DSS_HANDSHAKE_ACCEPTOR_DECIDE) { /* never a verdict for who is not proved: the peer refuses the zeros */
        handshake->state = DSS_HANDSHAKE_FAILED;
        return;
    }
    begin_message(message, VERDICT);
    message[VERDICT_AT] = (uint8_t)verdict;
    make_acceptor_mac(handshake, VERDICT, verdict, message + MAC_AT);
    handshake->verdict = verdict;
    handshake->state = DSS_HANDSHAKE_DONE;
}
