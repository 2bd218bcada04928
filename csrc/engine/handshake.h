/*
 * handshake.h: how two ranks make sure that they belong to one job, as a state machine over bytes: no socket, no clock.
 *
 * Four messages of 64 bytes: HELLO (who calls whom, in which epoch, a nonce), CHALLENGE (a nonce and an HMAC-SHA-256 over all that
 * was said, keyed with the job's secret), PROOF (the caller's HMAC), VERDICT (accepted, or why not, with an HMAC). Both sides prove
 * the secret without sending it; fresh nonces make a recording worthless. It keeps strays and strangers out; what follows is
 * neither encrypted nor authenticated, so it does not stop an attacker on the path.
 */
#ifndef DSS_HANDSHAKE_H
#define DSS_HANDSHAKE_H

#include <stdbool.h>

#include "status.h"

#define DSS_SECRET_BYTES 32u
#define DSS_NONCE_BYTES 16u
#define DSS_HANDSHAKE_MESSAGE_BYTES 64u

/*
 * Layout, little-endian; what is not named is 0:
 *
 *   all        0 magic "dssH" | 4 u8 version 2 | 5 u8 type (HELLO 1, CHALLENGE 2, PROOF 3, VERDICT 4)
 *   HELLO      8 u64 epoch | 16 u32 from | 20 u32 to | 24 u32 world_size | 28 u32 way | 32 dialer's nonce[16] | 48 MAC[16]
 *   CHALLENGE  8 acceptor's nonce[16] | 32 MAC[32]
 *   PROOF      32 MAC[32]
 *   VERDICT    8 u8 verdict | 32 MAC[32]
 *
 * Each MAC (HELLO has the first half of one) covers its message's label, epoch, both ranks, world size, way, both nonces and the
 * verdict, those not known yet being 0: so no message serves in the place, the direction or the connection of another. HELLO's
 * keeps the acceptor from answering strangers at all; it can be replayed, but no PROOF that fits the acceptor's new nonce can.
 */

typedef enum dss_verdict {
    DSS_VERDICT_NONE = 0, /* not known yet */
    DSS_VERDICT_WELCOME = 1,
    DSS_VERDICT_DUPLICATE = 2, /* another call of these ranks is used, or nobody waits for a way back */
    DSS_VERDICT_LEAVING = 3,   /* the acceptor is shutting down */
} dss_verdict_t;

/* Which of two connections it is, where each carries one direction (TCP). */
typedef enum dss_way {
    DSS_WAY_FORTH = 0, /* the dialer sends on it; where there is only one connection, both do */
    DSS_WAY_BACK = 1,  /* the acceptor of the first sends on it; its dialer is the same rank */
} dss_way_t;

typedef struct dss_identity {
    uint8_t secret[DSS_SECRET_BYTES];
    uint64_t epoch; /* random, one for each context of a job */
    uint32_t rank;
    uint32_t world_size;
} dss_identity_t;

typedef enum dss_handshake_state {
    DSS_HANDSHAKE_DIALER_CHALLENGE, /* HELLO is out; waits for the CHALLENGE */
    DSS_HANDSHAKE_DIALER_VERDICT,   /* PROOF is out; waits for the VERDICT */
    DSS_HANDSHAKE_ACCEPTOR_HELLO,
    DSS_HANDSHAKE_ACCEPTOR_PROOF,
    DSS_HANDSHAKE_ACCEPTOR_DECIDE, /* the peer is proved; dss_handshake_decide() is due */
    DSS_HANDSHAKE_DONE,            /* `peer` and `verdict` hold */
    DSS_HANDSHAKE_FAILED,
} dss_handshake_state_t;

typedef struct dss_handshake {
    const dss_identity_t *identity; /* not owned */
    dss_handshake_state_t state;
    uint32_t peer; /* dialer: from the start; acceptor: claimed from HELLO on, proved from DECIDE on */
    dss_way_t way; /* acceptor: proved from DECIDE on */
    dss_verdict_t verdict;
    uint8_t dialer_nonce[DSS_NONCE_BYTES];
    uint8_t acceptor_nonce[DSS_NONCE_BYTES];
} dss_handshake_t;

/* `nonce` is random and this side's. The dialer's first message is written to `message`. */
void dss_handshake_dial(dss_handshake_t *handshake, const dss_identity_t *identity, uint32_t peer, dss_way_t way,
                        const uint8_t nonce[DSS_NONCE_BYTES], uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES]);
void dss_handshake_accept(dss_handshake_t *handshake, const dss_identity_t *identity, const uint8_t nonce[DSS_NONCE_BYTES]);

/* Takes the peer's next message. *answer_p tells whether `answer` was written and must be sent. On an error the state is FAILED and
 * nothing may be sent: DSS_ERR_CORRUPT for bytes that are no message of this version, DSS_ERR_STRANGER for another epoch, world
 * size, rank or secret; a rank that calls itself is a stranger too. */
dss_status_t dss_handshake_step(dss_handshake_t *handshake, const uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES],
                                uint8_t answer[DSS_HANDSHAKE_MESSAGE_BYTES], bool *answer_p, dss_error_t *error_p);
/* The acceptor's decision, in state DECIDE; the state is DONE afterwards. In any other state FAILED, and `message` is zeros. */
void dss_handshake_decide(dss_handshake_t *handshake, dss_verdict_t verdict, uint8_t message[DSS_HANDSHAKE_MESSAGE_BYTES]);

#endif
