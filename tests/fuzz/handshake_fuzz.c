/*
 * An attacker on the path, whom the input directs: ranks dial and accept as it likes, it reads all they say, and it delivers what
 * it likes to whom it likes: their messages whole, changed or spliced, from now or from before, to either side, or bytes of its
 * own. Some ranks are of another job, with a secret of their own, and play along.
 *
 * What must hold: an acceptor that takes its caller for proved has an honest caller of that rank, in this very conversation (both
 * nonces the same), who called it; a dialer that takes a verdict has the acceptor that gave it. Who fails stays failed, says why,
 * sends nothing and tells no secret.
 */
#include "driver.h"

#include "handshake.h"

#define MAX_MACHINES 12u
#define MAX_MESSAGES 48u
#define RANK_COUNT 3u

const unsigned long fuzz_input_count = 20000;
unsigned long fuzz_through_count;

typedef uint8_t message_t[DSS_HANDSHAKE_MESSAGE_BYTES];
typedef enum action { NEW, DELIVER, PATCH, SPLICE, RAW, DECIDE, ACTION_COUNT } action_t;

typedef struct machine {
    dss_identity_t identity;
    dss_handshake_t handshake;
    bool dials;
} machine_t;

typedef struct scene {
    const uint8_t *script; /* what is left of the input */
    size_t script_bytes;
    machine_t machines[MAX_MACHINES];
    unsigned machine_count;
    message_t messages[MAX_MESSAGES]; /* all that was ever said */
    unsigned message_count;
} scene_t;

static const char secrets[2][DSS_SECRET_BYTES + 1] = {"Hidden:By_Honest#Ranks;32*Bytes.", "HIDDEN:BY_OTHER#RANKS;OF*BYTES.."};

static uint8_t next_byte(scene_t *scene) {
    if (!scene->script_bytes)
        return 0;
    scene->script_bytes--;
    return *scene->script++;
}

/* What a rank says becomes the attacker's. */
static void record(scene_t *scene, const message_t message) {
    if (scene->message_count < MAX_MESSAGES)
        memcpy(scene->messages[scene->message_count++], message, sizeof(message_t));
}

/* One byte of how: dials, of the other job, of another epoch or world size; one of the ranks. */
static void new_machine(scene_t *scene) {
    const uint8_t how = next_byte(scene);
    const uint8_t ranks = next_byte(scene);
    uint8_t nonce[DSS_NONCE_BYTES] = {0};
    message_t hello;
    if (scene->machine_count == MAX_MACHINES)
        return;
    machine_t *machine = &scene->machines[scene->machine_count++];
    nonce[0] = (uint8_t)scene->machine_count; /* no two the same, as with honest chance */
    machine->dials = how & 1;
    machine->identity =
        (dss_identity_t){.epoch = how & 4 ? 8 : 7, .rank = ranks % RANK_COUNT, .world_size = how & 8 ? RANK_COUNT + 1 : RANK_COUNT};
    memcpy(machine->identity.secret, secrets[how >> 1 & 1], DSS_SECRET_BYTES);
    if (!machine->dials) {
        dss_handshake_accept(&machine->handshake, &machine->identity, nonce);
        return;
    }
    const dss_way_t way = how & 16 ? DSS_WAY_BACK : DSS_WAY_FORTH;
    dss_handshake_dial(&machine->handshake, &machine->identity, ranks / RANK_COUNT % RANK_COUNT, way, nonce, hello);
    record(scene, hello);
}

/* Whether `other` is the other side of this machine's conversation, and knows it. */
static bool is_partner(const machine_t *machine, const machine_t *other) {
    const dss_handshake_t *mine = &machine->handshake;
    const dss_handshake_t *theirs = &other->handshake;
    return other->dials != machine->dials && memcmp(other->identity.secret, machine->identity.secret, DSS_SECRET_BYTES) == 0 &&
           other->identity.epoch == machine->identity.epoch && other->identity.world_size == machine->identity.world_size &&
           mine->way == theirs->way && mine->peer == other->identity.rank && theirs->peer == machine->identity.rank &&
           memcmp(mine->dialer_nonce, theirs->dialer_nonce, DSS_NONCE_BYTES) == 0 &&
           memcmp(mine->acceptor_nonce, theirs->acceptor_nonce, DSS_NONCE_BYTES) == 0;
}

/* Of a machine that has just come to DECIDE or DONE. */
static void check_trust_is_earned(const scene_t *scene, const machine_t *machine) {
    for (unsigned i = 0; i < scene->machine_count; i++) {
        const machine_t *other = &scene->machines[i];
        if (!is_partner(machine, other))
            continue;
        if (!machine->dials) { /* the caller has seen our CHALLENGE */
            CHECK_FOR(other->handshake.state == DSS_HANDSHAKE_DIALER_VERDICT || other->handshake.state == DSS_HANDSHAKE_FAILED,
                      "state %d", (int)other->handshake.state);
            return;
        }
        CHECK_EQUAL(machine->handshake.verdict, other->handshake.verdict);
        fuzz_through_count++;
        return;
    }
    CHECK_FAIL("rank %u trusts rank %u, which did not talk to it", machine->identity.rank, machine->handshake.peer);
}

/* Whether the attacker itself said these four bytes, in either order, which an error may then quote as a number: libFuzzer learns
 * secrets from the comparisons here. */
static bool said_itself(const message_t message, const char part[4]) {
    for (size_t i = 0; i + 4 <= sizeof(message_t); i++) {
        const uint8_t reversed[4] = {message[i + 3], message[i + 2], message[i + 1], message[i]};
        if (memcmp(message + i, part, 4) == 0 || memcmp(reversed, part, 4) == 0)
            return true;
    }
    return false;
}

static void check_text(const dss_error_t *error, dss_status_t status, const message_t message) {
    CHECK(status == DSS_ERR_CORRUPT || status == DSS_ERR_STRANGER);
    CHECK_STATUS(error->status, status);
    CHECK(error->text[0] && memchr(error->text, 0, sizeof error->text));
    for (unsigned job = 0; job < 2; job++)
        for (const char *part = secrets[job]; part < secrets[job] + DSS_SECRET_BYTES; part += 4) {
            char raw[5] = "";
            char hex[9];
            memcpy(raw, part, 4);
            snprintf(hex, sizeof hex, "%02x%02x%02x%02x", part[0], part[1], part[2], part[3]);
            CHECK_FOR(!strstr(error->text, raw) && (!strstr(error->text, hex) || said_itself(message, part)), "%s", error->text);
        }
}

static void deliver(scene_t *scene, const message_t message, uint8_t whom) {
    message_t answer;
    message_t untouched;
    bool answered = true;
    dss_error_t error = {DSS_OK, ""};
    if (!scene->machine_count)
        return;
    machine_t *machine = &scene->machines[whom % scene->machine_count];
    const dss_handshake_state_t before = machine->handshake.state;
    memset(answer, 0x5a, sizeof answer);
    memset(untouched, 0x5a, sizeof untouched);
    const dss_status_t status = dss_handshake_step(&machine->handshake, message, answer, &answered, &error);
    const dss_handshake_state_t after = machine->handshake.state;
    CHECK_EQUAL(status != DSS_OK, after == DSS_HANDSHAKE_FAILED);
    CHECK_EQUAL(answered, after == DSS_HANDSHAKE_ACCEPTOR_PROOF || after == DSS_HANDSHAKE_DIALER_VERDICT);
    if (answered)
        record(scene, answer);
    else
        CHECK(memcmp(answer, untouched, sizeof answer) == 0);
    if (status != DSS_OK)
        check_text(&error, status, message);
    else
        CHECK(before != DSS_HANDSHAKE_FAILED && before != after);
    if (after == DSS_HANDSHAKE_ACCEPTOR_DECIDE || after == DSS_HANDSHAKE_DONE)
        check_trust_is_earned(scene, machine);
}

static const uint8_t *pick(scene_t *scene) {
    static const message_t nothing;
    const uint8_t which = next_byte(scene);
    return scene->message_count ? scene->messages[which % scene->message_count] : nothing;
}

/* The engine decides only where that is due. */
static void decide(scene_t *scene) {
    const uint8_t whom = next_byte(scene);
    const dss_verdict_t verdict = (dss_verdict_t)(DSS_VERDICT_WELCOME + next_byte(scene) % 3);
    message_t message;
    if (!scene->machine_count)
        return;
    dss_handshake_t *handshake = &scene->machines[whom % scene->machine_count].handshake;
    if (handshake->state != DSS_HANDSHAKE_ACCEPTOR_DECIDE)
        return;
    dss_handshake_decide(handshake, verdict, message);
    CHECK_EQUAL(handshake->state, DSS_HANDSHAKE_DONE);
    record(scene, message);
}

static void act(scene_t *scene) {
    message_t message = {0};
    switch ((action_t)(next_byte(scene) % ACTION_COUNT)) {
    case NEW:
        new_machine(scene);
        return;
    case DECIDE:
        decide(scene);
        return;
    case DELIVER:
        memcpy(message, pick(scene), sizeof message);
        break;
    case PATCH: {
        memcpy(message, pick(scene), sizeof message);
        const size_t at = next_byte(scene) % sizeof message;
        message[at] = next_byte(scene);
        break;
    }
    case SPLICE: {
        const size_t cut = next_byte(scene) % sizeof message;
        memcpy(message, pick(scene), cut);
        memcpy(message + cut, pick(scene) + cut, sizeof message - cut);
        break;
    }
    default:
        for (size_t i = 0; i < sizeof message; i++)
            message[i] = next_byte(scene);
    }
    deliver(scene, message, next_byte(scene));
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t bytes_count) {
    scene_t scene = {.script = bytes, .script_bytes = bytes_count};
    while (scene.script_bytes)
        act(&scene);
    return 0;
}

/* Ranks are written as own + 3 * other's; machines and messages count from 0 as they come. The attacks begin from here too: blind
 * chance does not find those that take several right steps. */
size_t fuzz_seed(unsigned number, uint8_t bytes[FUZZ_INPUT_BYTES]) {
    static const uint8_t meeting[] = {
        NEW,     0, 1, NEW,     1, 0 + 3, /* rank 1 listens, rank 0 dials it */
        DELIVER, 0, 0, DELIVER, 1, 1,     DELIVER, 2, 0, DECIDE, 0, 0, DELIVER, 3, 1,
    };
    static const uint8_t crossing[] = {
        NEW,     0, 0, NEW,     0, 1, NEW,     1, 0 + 3, NEW,     1, 1, /* both listen and dial */
        DELIVER, 0, 1, DELIVER, 1, 0, DELIVER, 2, 2,     DELIVER, 3, 3, DELIVER, 4, 1,
        DELIVER, 5, 0, DECIDE,  1, 0, DECIDE,  0, 1,     DELIVER, 6, 2, DELIVER, 7, 3,
    };
    static const uint8_t other_job_beside[] = {
        NEW,     0, 1,  NEW,     1, 0 + 3,  NEW,     2, 1, NEW,    3, 0 + 3, /* machines 2 and 3 are of the other job */
        DELIVER, 1, 2,  DELIVER, 2, 3,      DELIVER, 3, 2, DECIDE, 2, 0,     DELIVER, 4, 3, /* and meet */
        PATCH,   0, 16, 2,       0, SPLICE, 32,      0, 1, 0,
    };
    static const uint8_t replays[] = {
        NEW,    0, 1,     NEW,     1, 0 + 3, DELIVER, 0, 0, DELIVER, 1, 1, DELIVER, 2, 0,
        DECIDE, 0, 0,     DELIVER, 3, 1,     NEW,     0, 1, DELIVER, 0, 2, DELIVER, 2, 2, /* to a new acceptor */
        NEW,    1, 0 + 3, DELIVER, 1, 3,     DELIVER, 3, 3,                               /* to a new dialer */
    };
    static const uint8_t reflection[] = {
        NEW, 0, 1, NEW, 1, 0 + 3, DELIVER, 0, 0, DELIVER, 1,  1, DELIVER, 2, 0,
        NEW, 0, 1, NEW, 1, 0 + 3, DELIVER, 3, 2, SPLICE,  32, 2, 4,       2, /* the CHALLENGE's MAC in the envelope of a PROOF */
    };
    static const uint8_t false_name[] = {NEW, 0, 1, NEW, 1, 0 + 3, PATCH, 0, 16, 2, 0, DELIVER, 1, 1, DELIVER, 2, 0};
    static const uint8_t false_goal[] = {NEW, 0, 1, NEW, 1, 0 + 6, PATCH, 0, 20, 1, 0, DELIVER, 1, 1, DELIVER, 2, 0};
    static const uint8_t false_verdict[] = {
        NEW, 0, 1, NEW, 1, 0 + 3, DELIVER, 0, 0, DELIVER, 1, 1, DELIVER, 2, 0, DECIDE, 0, 2, PATCH, 3, 8, DSS_VERDICT_WELCOME, 1,
    };
#define SEED(name)                                                                                                                 \
    {                                                                                                                              \
        name, sizeof name                                                                                                          \
    }
    static const struct {
        const uint8_t *bytes;
        size_t bytes_count;
    } seeds[] = {SEED(meeting),    SEED(crossing),   SEED(other_job_beside), SEED(replays),
                 SEED(reflection), SEED(false_name), SEED(false_goal),       SEED(false_verdict)};
    if (number >= sizeof seeds / sizeof *seeds)
        return 0;
    memcpy(bytes, seeds[number].bytes, seeds[number].bytes_count);
    return seeds[number].bytes_count;
}
