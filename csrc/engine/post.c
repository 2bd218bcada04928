/*
 * Operations from the caller to the loop, and back.
 */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "descriptors.h"
#include "hash.h"

bool dss_key_related(const dss_key_t *one, const dss_key_t *other) {
    return one->channel == other->channel && one->sequence == other->sequence && one->part == other->part;
}

bool dss_key_equal(const dss_key_t *one, const dss_key_t *other) {
    return dss_key_related(one, other) && one->stage == other->stage;
}

uint32_t dss_key_bucket(const dss_key_t *key) {
    uint64_t mixed = key->channel ^ (key->sequence * 0x9e3779b97f4a7c15u) ^ ((uint64_t)key->part << 32) ^ key->stage;
    mixed ^= mixed >> 29;
    return (uint32_t)(mixed ^ (mixed >> 13)) & (DSS_TABLE_SIZE - 1);
}

dss_operation_t *dss_engine_find(dss_engine_t *engine, const dss_key_t *key) {
    dss_operation_t *operation = engine->table[dss_key_bucket(key)];
    while (operation && !dss_key_equal(&operation->key, key))
        operation = operation->next_in_bucket;
    return operation;
}

void dss_engine_insert(dss_engine_t *engine, dss_operation_t *operation) {
    dss_operation_t **bucket = &engine->table[dss_key_bucket(&operation->key)];
    operation->next_in_bucket = *bucket;
    *bucket = operation;
    operation->next = engine->operations;
    if (operation->next)
        operation->next->previous_p = &operation->next;
    operation->previous_p = &engine->operations;
    engine->operations = operation;
}

static dss_status_t check_members(const dss_engine_t *engine, const dss_operation_params_t *params, dss_error_t *error_p) {
    bool has_own = false;
    for (uint32_t i = 0; i < params->member_count; i++) {
        const uint32_t rank = params->members[i];
        if (rank >= engine->identity.world_size || (i > 0 && rank <= params->members[i - 1]))
            return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "members: rank %u at %u; they must be ascending and below %u", rank,
                            i, engine->identity.world_size);
        has_own = has_own || rank == engine->identity.rank;
    }
    if (!has_own)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "members: rank %u, which posts, is not among them",
                        engine->identity.rank);
    return DSS_OK;
}

static dss_status_t check_params(const dss_engine_t *engine, const dss_operation_params_t *params, dss_error_t *error_p) {
    const bool moves_values = params->kind != DSS_OPERATION_BARRIER;
    if (engine->generation != dss_descriptor_generation())
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "a forked child of rank %u has no part in its process group",
                        engine->identity.rank);
    if (params->params_bytes != sizeof *params || !params->done)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "params: %zu bytes, expected %zu, and a callback", params->params_bytes,
                        sizeof *params);
    if (params->kind < DSS_OPERATION_AVERAGE || params->kind > DSS_OPERATION_CROSSING_OF_VALUES)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "kind: %d is unknown", (int)params->kind);
    if (dss_dtype_bytes(params->dtype) == 0 || (moves_values && !dss_reduction_takes(params->reduction, params->dtype)))
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "no %s of %s", dss_reduction_name(params->reduction),
                        dss_dtype_name(params->dtype));
    if (params->key.stage)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "key: stage is %u, and only the engine may set it", params->key.stage);
    const bool averages = params->kind == DSS_OPERATION_AVERAGE || dss_is_crossing(params->kind);
    if (averages && (params->reduction != DSS_SUM || params->dtype > DSS_BFLOAT16))
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "an average needs a sum of a floating dtype, got %s of %s",
                        dss_reduction_name(params->reduction), dss_dtype_name(params->dtype));
    if (!moves_values && params->segment_count > 0)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "a barrier has no values, got %zu arrays", params->segment_count);
    return check_members(engine, params, error_p);
}

static void destroy_operation(dss_operation_t *operation) {
    dss_segments_release(&operation->segments);
    dss_hierarchy_destroy(operation->hierarchy);
    free(operation->scratch);
    free(operation->posted);
    free(operation->snapshot);
    free(operation->text);
    free(operation->members);
    free(operation);
}

void dss_operation_unreference(dss_operation_t *operation) {
    if (--operation->references > 0)
        return;
    dss_operation_t *parent = operation->parent;
    destroy_operation(operation);
    if (parent)
        dss_operation_unreference(parent);
}

static void become_stage(dss_operation_t *operation, const dss_stage_t *stage) {
    operation->parent = stage->parent;
    operation->parent->references++;
    operation->key.stage = stage->number;
    operation->scale = stage->scale;
    memcpy(operation->skips, stage->skips, sizeof operation->skips);
    operation->signature.element_count = stage->parent->signature.element_count;
}

/* Outside the lock, as it may take long. */
static bool take_snapshot(dss_operation_t *operation) {
    operation->snapshot = malloc((size_t)operation->segments.bytes + 1);
    for (uint64_t at = 0; operation->snapshot && at < operation->segments.bytes;) {
        size_t piece = 0;
        const uint8_t *bytes = dss_segments_at(&operation->segments, at, &piece);
        memcpy(operation->snapshot + at, bytes, piece);
        at += piece;
    }
    return operation->snapshot != NULL;
}

static dss_operation_t *make_operation(dss_engine_t *engine, const dss_operation_params_t *params, const dss_stage_t *stage,
                                       dss_error_t *error_p) {
    dss_operation_t *operation = calloc(1, sizeof *operation);
    dss_member_t *members = calloc(params->member_count, sizeof *members);
    if (!operation || !members) {
        free(operation);
        free(members);
        (void)dss_fail(error_p, DSS_ERR_NO_MEMORY, "out of memory for an operation");
        return NULL;
    }
    *operation = (dss_operation_t){.engine = engine,
                                   .references = 1,
                                   .kind = params->kind,
                                   .dtype = params->dtype,
                                   .reduction = params->reduction,
                                   .key = params->key,
                                   .member_count = params->member_count,
                                   .members = members,
                                   .scale = params->kind == DSS_OPERATION_AVERAGE ? 1.0 / params->member_count : 1.0,
                                   .timeout_ns = params->timeout_ns,
                                   .done = params->done,
                                   .argument = params->argument};
    (void)snprintf(operation->what, sizeof operation->what, "%s", params->what ? params->what : "operation");
    for (size_t i = 0; i < params->segment_count; i++)
        operation->element_count += params->segments[i].element_count;
    operation->signature = (dss_signature_t){.kind = (uint8_t)params->kind,
                                             .dtype = (uint8_t)params->dtype,
                                             .reduction = (uint8_t)params->reduction,
                                             .member_count = params->member_count,
                                             .element_count = operation->element_count,
                                             .members_hash = dss_hash(params->members, params->member_count * sizeof(uint32_t), 0),
                                             .layout = params->layout};
    for (uint32_t i = 0; i < params->member_count; i++) {
        const uint32_t rank = params->members[i];
        members[i] = (dss_member_t){.operation = operation, .index = i};
        if (rank == engine->identity.rank)
            operation->own_index = i;
        else
            members[i].peer = &engine->peers[rank];
    }
    dss_status_t status =
        dss_segments_create(&operation->segments, params->segments, params->segment_count, dss_dtype_bytes(params->dtype));
    if (stage)
        become_stage(operation, stage);
    if (status == DSS_OK && !stage && params->kind == DSS_OPERATION_CROSSING_OF_VALUES && !take_snapshot(operation))
        status = DSS_ERR_NO_MEMORY;
    if (status == DSS_OK && !dss_operation_plan(operation))
        status = DSS_ERR_NO_MEMORY;
    if (status != DSS_OK) {
        (void)dss_fail(error_p, status, "%s",
                       status == DSS_ERR_NO_MEMORY ? "out of memory for an operation" : "an array is NULL or too long");
        dss_operation_unreference(operation);
        return NULL;
    }
    return operation;
}

/* The peer posted first: what it sent ahead is used. */
static void meet_ahead(dss_member_t *member) {
    dss_ahead_t *ahead = dss_peer_take_ahead(member->peer, &member->operation->key);
    if (!ahead)
        return;
    if (member->peer->keeping == ahead) {
        member->peer->keeping = NULL;
        member->peer->reading = member;
    }
    const bool fits = ahead->eager.end + (member->peer->reading == member ? member->peer->frame_left : 0) <=
                      member->receive_goal[DSS_PHASE_REDUCE];
    dss_member_open(member, &ahead->signature);
    if (!member->operation->completed && !fits)
        dss_peer_lose(member->peer, "sent nonsense: more values than its operation has");
    else if (!member->operation->completed && ahead->eager.end > 0 &&
             !dss_operation_stage(member, ahead->eager.bytes, ahead->eager.end))
        dss_peer_lose(member->peer, "cannot be listened to: out of memory");
    dss_ahead_destroy(ahead);
}

static void join_peer(dss_member_t *member) {
    dss_peer_t *peer = member->peer;
    member->next_of_peer = peer->operations;
    if (member->next_of_peer)
        member->next_of_peer->previous_of_peer_p = &member->next_of_peer;
    member->previous_of_peer_p = &peer->operations;
    peer->operations = member;
    if (peer->state == DSS_PEER_READY)
        dss_member_announce(member);
    const uint64_t bytes = member->send_goal[DSS_PHASE_REDUCE];
    const bool has_some =
        bytes > 0 || member->send_goal[DSS_PHASE_GATHER] == 0; /* results are never sent before they are awaited */
    if (has_some && bytes <= DSS_EAGER_BYTES && peer->eager_sent + bytes <= DSS_EAGER_TOTAL) {
        member->eager = true;
        peer->eager_sent += (size_t)bytes;
        dss_peer_queue(member);
    }
}

/* What forbids to begin at all; NULL: nothing. Writes the phase. */
static const char *obstacle(dss_engine_t *engine, const dss_operation_t *operation, dss_status_t *status_p) {
    const dss_channel_t *channel = dss_channel_failed(engine, operation->key.channel);
    *status_p = DSS_ERR_SHUT_DOWN;
    if (engine->stopping || engine->aborted)
        return engine->aborted ? engine->aborted : "the process group has been shut down";
    *status_p = DSS_ERR_FAILED;
    if (channel)
        return channel->text ? channel->text : "it failed before";
    *status_p = DSS_ERR_PEER_LOST;
    for (uint32_t i = 0; i < operation->member_count; i++) {
        const dss_peer_t *peer = operation->members[i].peer;
        if (peer && peer->state == DSS_PEER_LOST)
            return peer->lost ? peer->lost : "a peer is gone";
    }
    return NULL;
}

/* Ranks that called different things may have gone different ways, and would never meet. */
static bool meets_another(dss_operation_t *operation) {
    const uint32_t bucket = dss_ahead_bucket(&operation->key);
    for (uint32_t i = 0; !operation->parent && i < operation->member_count; i++) {
        dss_peer_t *peer = operation->members[i].peer;
        for (const dss_ahead_t *ahead = peer ? peer->ahead[bucket] : NULL; ahead; ahead = ahead->next)
            if (dss_key_related(&ahead->key, &operation->key) &&
                (operation->algorithm == DSS_HIERARCHY) != (ahead->key.stage != 0)) {
                const dss_signature_t theirs = ahead->signature;
                dss_operation_mismatch(operation, peer, &theirs);
                return true;
            }
    }
    return false;
}

static void begin(dss_operation_t *operation) {
    dss_engine_t *engine = operation->engine;
    dss_status_t status = DSS_OK;
    const char *reason = obstacle(engine, operation, &status);
    if (reason) {
        dss_operation_fail(operation, status, "start", reason);
        return;
    }
    if (meets_another(operation))
        return;
    if (operation->algorithm == DSS_HIERARCHY) {
        dss_hierarchy_begin(operation);
        return;
    }
    for (uint32_t i = 0; i < operation->member_count && !operation->completed; i++) {
        if (!operation->members[i].peer)
            continue;
        join_peer(&operation->members[i]);
        if (!operation->completed)
            meet_ahead(&operation->members[i]);
    }
    for (uint32_t i = 0; i < operation->member_count; i++) { /* also when it is complete: the others wait for our OPEN */
        dss_peer_t *peer = operation->members[i].peer;
        if (peer && peer->state == DSS_PEER_UNKNOWN)
            dss_connect_dial(peer);
        else if (peer)
            (void)dss_peer_progress(peer);
    }
    if (!operation->completed && operation->staged)
        (void)dss_operation_unstage(operation);
    dss_operation_check(operation);
}

dss_status_t dss_engine_post(dss_engine_t *engine, const dss_operation_params_t *params, dss_operation_t **operation_p,
                             dss_error_t *error_p) {
    dss_status_t status = check_params(engine, params, error_p);
    if (status != DSS_OK)
        return status;
    dss_operation_t *operation = make_operation(engine, params, NULL, error_p);
    if (!operation)
        return DSS_ERR_NO_MEMORY;
    dss_engine_lock(engine);
    if (dss_engine_find(engine, &operation->key)) {
        dss_engine_unlock(engine);
        destroy_operation(operation);
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "%s: an operation with this key is under way already", params->what);
    }
    operation->deadline_ns = dss_now_ns() + params->timeout_ns;
    if (operation->deadline_ns < params->timeout_ns)
        operation->deadline_ns = UINT64_MAX;
    if (operation_p) {
        operation->references++;
        *operation_p = operation;
    }
    dss_engine_insert(engine, operation);
    begin(operation);
    if (!params->will_wait || operation->completed || engine->driven)
        dss_engine_hand_over(engine);
    dss_engine_unlock(engine);
    return DSS_OK;
}

dss_status_t dss_engine_post_stage(dss_engine_t *engine, const dss_operation_params_t *params, const dss_stage_t *stage,
                                   dss_error_t *error_p) {
    dss_operation_t *operation = make_operation(engine, params, stage, error_p);
    if (!operation)
        return DSS_ERR_NO_MEMORY;
    operation->deadline_ns = stage->parent->stage_deadline_ns;
    dss_engine_insert(engine, operation);
    begin(operation);
    return DSS_OK;
}

dss_status_t dss_operation_result(const dss_operation_t *operation, dss_error_t *error_p) {
    dss_engine_t *engine = operation->engine;
    dss_engine_lock(engine);
    dss_status_t status = operation->status;
    if (status != DSS_OK)
        status = dss_fail(error_p, status, "%s", operation->text ? operation->text : dss_status_string(status));
    dss_engine_unlock(engine);
    return status;
}

void dss_operation_release(dss_operation_t *operation) {
    if (!operation || operation->engine->generation != dss_descriptor_generation())
        return; /* a forked child's copy: its lock may be held for ever */
    dss_engine_t *engine = operation->engine;
    dss_engine_lock(engine);
    dss_operation_unreference(operation);
    dss_engine_unlock(engine);
}
