/*
 * How operations end, and how a failure becomes an error on every rank instead of a hang.
 *
 * The first failure on a channel ends the channel: ranks may be out of step from then on. Its text goes to all connected ranks at
 * once, and to any other as soon as it posts something on that channel, so nobody waits for a rank that has given up.
 */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "descriptors.h"

#define TEXT_BYTES 1400

char *dss_text_copy(const char *text) {
    const size_t bytes = strlen(text) + 1;
    char *copy = malloc(bytes);
    if (copy)
        memcpy(copy, text, bytes);
    return copy;
}

void dss_operation_complete(dss_operation_t *operation, dss_status_t status, const char *text) {
    dss_engine_t *engine = operation->engine;
    if (operation->completed)
        return;
    operation->completed = true;
    operation->status = status;
    operation->text = text ? dss_text_copy(text) : NULL;
    for (uint32_t i = 0; i < operation->member_count; i++)
        dss_peer_forget(&operation->members[i]);
    dss_operation_t **at = &engine->table[dss_key_bucket(&operation->key)];
    while (*at != operation)
        at = &(*at)->next_in_bucket;
    *at = operation->next_in_bucket;
    *operation->previous_p = operation->next;
    if (operation->next)
        operation->next->previous_p = operation->previous_p;
    operation->next = NULL;
    *engine->last_completed_p = operation;
    engine->last_completed_p = &operation->next;
    engine->stats.operations_done++;
}

dss_channel_t *dss_channel_failed(dss_engine_t *engine, uint64_t id) {
    dss_channel_t *channel = engine->channels;
    while (channel && channel->id != id)
        channel = channel->next;
    return channel;
}

void dss_channel_tell(dss_channel_t *channel, dss_peer_t *peer) {
    const char *text = channel->text ? channel->text : "it failed, and its memory is out";
    if (channel->told && channel->told[peer->rank])
        return;
    if (channel->told)
        channel->told[peer->rank] = 1;
    const size_t bytes = strlen(text);
    const dss_frame_t frame = {.type = DSS_FRAME_FAIL,
                               .payload_bytes = (uint32_t)(bytes < DSS_MAX_FAIL_TEXT ? bytes : DSS_MAX_FAIL_TEXT),
                               .key = {.channel = channel->id}};
    dss_peer_say(peer, &frame, text);
}

static dss_channel_t *add_channel(dss_engine_t *engine, uint64_t id, const char *text) {
    dss_channel_t *channel = calloc(1, sizeof *channel);
    if (!channel)
        return NULL;
    *channel = (dss_channel_t){.id = id, .text = dss_text_copy(text), .next = engine->channels};
    channel->told = calloc(engine->identity.world_size, 1);
    engine->channels = channel;
    return channel;
}

static void describe_failure(const dss_operation_t *operation, const char *phase, const char *cause, char *text, size_t capacity) {
    char call[128];
    dss_signature_describe(&operation->signature, call, sizeof call);
    (void)snprintf(text, capacity, "%s (%s) failed on rank %u of %u, phase %s: %s", operation->what, call,
                   operation->engine->identity.rank, operation->engine->identity.world_size, phase, cause);
}

/* Of an operation in stages the peer was heard of in one of them: it has launched the operation. */
static bool has_launched(const dss_operation_t *operation, const dss_peer_t *peer) {
    dss_key_t own = operation->key;
    dss_key_t latest = peer->latest;
    own.stage = latest.stage = 0;
    return dss_key_equal(&own, &latest);
}

static bool has_started(const dss_operation_t *operation) {
    const dss_engine_t *engine = operation->engine;
    for (uint32_t i = 0; i < operation->member_count; i++)
        if (operation->members[i].opened)
            return true;
    for (uint32_t i = 0; (operation->parent || operation->hierarchy) && i < engine->identity.world_size; i++)
        if (has_launched(operation, &engine->peers[i]))
            return true;
    return false;
}

void dss_operation_cancel(dss_operation_t *operation, dss_status_t status, const char *cause) {
    char text[TEXT_BYTES + 400];
    describe_failure(operation, has_started(operation) ? "transfer" : "start", cause, text, sizeof text);
    dss_operation_complete(operation, status, text);
}

/* Whether there were any. */
static bool fail_operations(dss_engine_t *engine, uint64_t channel, dss_status_t status, const char *text) {
    bool any = false;
    for (dss_operation_t *operation = engine->operations; operation;) {
        dss_operation_t *next = operation->next;
        if (operation->key.channel == channel) {
            dss_operation_cancel(operation, status, text);
            any = true;
        }
        operation = next;
    }
    return any;
}

void dss_channel_fail(dss_engine_t *engine, uint64_t id, dss_status_t status, const char *text, dss_peer_t *from) {
    if (dss_channel_failed(engine, id))
        return;
    dss_channel_t *channel = add_channel(engine, id, text);
    if (channel && channel->told && from)
        channel->told[from->rank] = 1;
    (void)fail_operations(engine, id, status, text);
    for (uint32_t i = 0; channel && i < engine->identity.world_size; i++) {
        dss_peer_drop_ahead(&engine->peers[i], id);
        if (engine->peers[i].state == DSS_PEER_READY)
            dss_channel_tell(channel, &engine->peers[i]);
    }
}

void dss_engine_close_channel(dss_engine_t *engine, uint64_t id, const char *reason) {
    char text[TEXT_BYTES];
    if (engine->generation != dss_descriptor_generation())
        return;
    dss_engine_lock(engine);
    (void)snprintf(text, sizeof text, "rank %u: %s", engine->identity.rank, reason);
    dss_channel_t *channel = dss_channel_failed(engine, id) ? NULL : add_channel(engine, id, text);
    const bool any = channel && fail_operations(engine, id, DSS_ERR_SHUT_DOWN, text);
    for (uint32_t i = 0; channel && i < engine->identity.world_size; i++) {
        dss_peer_t *peer = &engine->peers[i];
        bool waits = any; /* else only who has posted what this rank has not: others may still be finishing */
        for (uint32_t bucket = 0; bucket < DSS_AHEAD_BUCKETS; bucket++)
            for (const dss_ahead_t *ahead = peer->ahead[bucket]; ahead; ahead = ahead->next)
                waits = waits || ahead->key.channel == id;
        if (waits && peer->state == DSS_PEER_READY) {
            dss_channel_tell(channel, peer);
            (void)dss_peer_progress(peer);
        }
    }
    dss_engine_unlock(engine);
}

void dss_operation_fail(dss_operation_t *operation, dss_status_t status, const char *phase, const char *cause) {
    dss_engine_t *engine = operation->engine;
    const uint32_t rank = engine->identity.rank;
    const uint64_t channel = operation->key.channel;
    char text[TEXT_BYTES];
    char told[TEXT_BYTES + 40];
    if (operation->completed)
        return;
    if (operation->parent) { /* people know that one */
        dss_operation_complete(operation, status, cause);
        operation = operation->parent;
        if (operation->completed)
            return;
    }
    describe_failure(operation, phase, cause, text, sizeof text);
    dss_operation_complete(operation, status, text);
    (void)snprintf(told, sizeof told, "rank %u gave up: %s", rank, text);
    dss_channel_fail(engine, channel, DSS_ERR_FAILED, told, NULL);
}

static bool has_members_of(const dss_signature_t *signature, const dss_operation_t *operation) {
    return signature->member_count == operation->signature.member_count &&
           signature->members_hash == operation->signature.members_hash;
}

/* What the peer has launched instead, perhaps; NULL: nothing. On the operation's channel, or else of the same ranks: calls of one
 * kind may go over another channel than those of another kind, and never meet. */
static const dss_signature_t *find_another(const dss_member_t *member) {
    const dss_operation_t *operation = member->operation;
    const dss_peer_t *peer = member->peer;
    const dss_signature_t *found = has_members_of(&peer->gave_up, operation) ? &peer->gave_up : NULL;
    for (uint32_t bucket = 0; bucket < DSS_AHEAD_BUCKETS; bucket++)
        for (const dss_ahead_t *ahead = peer->ahead[bucket]; ahead; ahead = ahead->next)
            if (dss_key_related(&ahead->key, &operation->key))
                continue; /* a stage of the same call */
            else if (ahead->key.channel == operation->key.channel)
                return &ahead->signature;
            else if (has_members_of(&ahead->signature, operation))
                found = &ahead->signature;
    return found;
}

static uint64_t bytes_of(const uint64_t phases[2]) {
    return phases[DSS_PHASE_REDUCE] + phases[DSS_PHASE_GATHER];
}

static bool is_missing(const dss_member_t *member) {
    return member->peer && (!member->opened || bytes_of(member->received) < bytes_of(member->receive_goal) ||
                            bytes_of(member->sent) < bytes_of(member->send_goal));
}

/* It is there, and has launched the operation as far as one can know: its stages come one after the other. */
static bool waits_itself(const dss_member_t *member) {
    return member->operation->asked && member->peer->state == DSS_PEER_READY && !member->peer->asked &&
           (member->opened || member->operation->parent);
}

/* What the operation still waits for from one member; appends to `text`. */
static void describe_member(const dss_member_t *member, char *text, size_t capacity) {
    const dss_peer_t *peer = member->peer;
    char who[160];
    char instead[128] = "";
    const dss_signature_t *another = find_another(member);
    if (another)
        dss_signature_describe(another, instead, sizeof instead);
    const size_t used = strlen(text);
    dss_peer_text(peer, who, sizeof who);
    const char *separator = used > 0 ? "; " : "";
    if (peer->state != DSS_PEER_READY)
        (void)snprintf(text + used, capacity - used, "%s%s has not answered yet (%s)", separator, who,
                       peer->forth || (peer->dial && peer->dial->connected) ? "connected, its process does not answer the handshake"
                                                                            : "no connection");
    else if (!member->opened && !(member->operation->parent && has_launched(member->operation, peer)))
        (void)snprintf(text + used, capacity - used, "%s%s has not launched %s%s%s%s%s%s", separator, who, member->operation->what,
                       member->operation->parent ? ", or has stopped" : "",
                       waits_itself(member) ? ", or waits for another rank" : "", another ? " (but " : "", instead,
                       another ? ", which this rank has not)" : "");
    else
        (void)snprintf(text + used, capacity - used, "%s%s has stopped%s: %llu of %llu bytes came from it, %llu of %llu were sent",
                       separator, who, waits_itself(member) ? " or waits for another rank" : "",
                       (unsigned long long)bytes_of(member->received), (unsigned long long)bytes_of(member->receive_goal),
                       (unsigned long long)bytes_of(member->sent), (unsigned long long)bytes_of(member->send_goal));
}

void dss_operation_ask(dss_operation_t *operation) {
    operation->asked = true;
    for (uint32_t i = 0; i < operation->member_count; i++)
        if (is_missing(&operation->members[i]))
            dss_peer_ask(operation->members[i].peer);
}

static bool may_hold(const dss_operation_t *operation) {
    bool any = false;
    for (uint32_t i = 0; i < operation->member_count; i++) {
        const dss_member_t *member = &operation->members[i];
        if (is_missing(member) && !waits_itself(member))
            return false;
        any = any || is_missing(member);
    }
    return any && !operation->held;
}

void dss_operation_time_out(dss_operation_t *operation) {
    char missing[800] = "";
    char cause[900];
    if (may_hold(operation)) {
        operation->held = true;
        operation->deadline_ns += DSS_ASK_NS;
        return;
    }
    for (uint32_t i = 0; i < operation->member_count && strlen(missing) < 500; i++)
        if (is_missing(&operation->members[i]))
            describe_member(&operation->members[i], missing, sizeof missing);
    (void)snprintf(cause, sizeof cause, "timed out after %.1f s: %s", (double)operation->timeout_ns / 1e9, missing);
    dss_operation_fail(operation, DSS_ERR_TIMED_OUT, has_started(operation) ? "transfer" : "start", cause);
}

void dss_channel_release(dss_engine_t *engine) {
    while (engine->channels) {
        dss_channel_t *channel = engine->channels;
        engine->channels = channel->next;
        free(channel->text);
        free(channel->told);
        free(channel);
    }
}
