/*
 * Who sends which values to whom, and what becomes of those that come.
 *
 * Groups of three and more reduce in one fixed order (the shard's owner first, then ascending ranks), whatever the order of
 * arrival, so that a result does not depend on chance; what comes before its turn is staged. A pair reduces both ways at once: each
 * value that comes is reduced into the own one, but not before that has been sent.
 */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GATHER_PIECE ((size_t)64 << 10) /* results travel in pieces not smaller than this, but for the last */

static size_t element_bytes(const dss_operation_t *operation) {
    return dss_dtype_bytes(operation->dtype);
}

static dss_dtype_t accumulator(const dss_operation_t *operation) {
    return dss_dtype_accumulator(operation->dtype);
}

static bool is_widened(const dss_operation_t *operation) {
    return accumulator(operation) != operation->dtype;
}

uint64_t dss_operation_shard_at(const dss_operation_t *operation, uint32_t index) {
    return dss_stripe_begin(operation->signature.element_count, operation->member_count, index) * element_bytes(operation);
}

static dss_algorithm_t choose(const dss_operation_t *operation) {
    if (operation->member_count == 1)
        return DSS_ALONE;
    if (operation->member_count == 2)
        return DSS_PAIR;
    return operation->segments.bytes <= DSS_FLAT_BYTES ? DSS_FLAT : DSS_SHARDED;
}

static bool make_scratch(dss_operation_t *operation) {
    const uint64_t bytes = operation->segments.bytes;
    const size_t widening = is_widened(operation) ? dss_dtype_bytes(accumulator(operation)) / element_bytes(operation) : 1;
    size_t needed = 0;
    if (operation->algorithm == DSS_FLAT)
        needed = (size_t)(operation->member_count * bytes + widening * bytes);
    else if (operation->algorithm == DSS_SHARDED && widening > 1)
        needed = (size_t)(widening * operation->shard_bytes);
    if (needed == 0)
        return true;
    operation->scratch = malloc(needed);
    return operation->scratch != NULL;
}

static void copy_out(const dss_segments_t *segments, uint64_t at, uint8_t *target, size_t bytes) {
    while (bytes > 0) {
        size_t piece = 0;
        const uint8_t *values = dss_segments_at(segments, at, &piece);
        piece = piece < bytes ? piece : bytes;
        memcpy(target, values, piece);
        at += piece;
        target += piece;
        bytes -= piece;
    }
}

bool dss_operation_plan(dss_operation_t *operation) {
    const uint64_t bytes = operation->segments.bytes;
    operation->algorithm = choose(operation);
    operation->scale = operation->kind == DSS_OPERATION_AVERAGE ? 1.0 / operation->member_count : 1.0;
    if (operation->algorithm == DSS_SHARDED) {
        operation->shard_at = dss_operation_shard_at(operation, operation->own_index);
        operation->shard_bytes = dss_operation_shard_at(operation, operation->own_index + 1) - operation->shard_at;
    }
    for (uint32_t i = 0; i < operation->member_count; i++) {
        dss_member_t *member = &operation->members[i];
        if (i == operation->own_index)
            continue;
        if (operation->algorithm != DSS_SHARDED) {
            member->send_goal[DSS_PHASE_REDUCE] = member->receive_goal[DSS_PHASE_REDUCE] = bytes;
            continue;
        }
        const uint64_t shard = dss_operation_shard_at(operation, i + 1) - dss_operation_shard_at(operation, i);
        member->send_goal[DSS_PHASE_REDUCE] = member->receive_goal[DSS_PHASE_GATHER] = shard;
        member->send_goal[DSS_PHASE_GATHER] = member->receive_goal[DSS_PHASE_REDUCE] = operation->shard_bytes;
    }
    if (!make_scratch(operation))
        return false;
    if (operation->algorithm == DSS_FLAT)
        copy_out(&operation->segments, 0, operation->scratch + operation->own_index * bytes, (size_t)bytes);
    return true;
}

/* ---- sending ------------------------------------------------------------------------------------------------------------ */

uint64_t dss_operation_sendable(const dss_member_t *member, dss_phase_t *phase_p) {
    if (!member->opened && !member->eager)
        return 0;
    *phase_p = DSS_PHASE_REDUCE;
    const uint64_t own = member->send_goal[DSS_PHASE_REDUCE] - member->sent[DSS_PHASE_REDUCE];
    if (own > 0)
        return own;
    *phase_p = DSS_PHASE_GATHER;
    const uint64_t left = member->send_goal[DSS_PHASE_GATHER] - member->sent[DSS_PHASE_GATHER];
    const uint64_t reduced = left == 0 ? 0 : member->operation->reduced - member->sent[DSS_PHASE_GATHER];
    return reduced == left || reduced >= GATHER_PIECE ? reduced : 0;
}

size_t dss_operation_gather(const dss_member_t *member, dss_phase_t phase, uint64_t offset, size_t bytes, struct iovec *list,
                            int most, int *count_p) {
    const dss_operation_t *operation = member->operation;
    uint64_t at = offset;
    if (phase == DSS_PHASE_GATHER)
        at += operation->shard_at;
    else if (operation->algorithm == DSS_SHARDED)
        at += dss_operation_shard_at(operation, member->index);
    size_t gathered = 0;
    int count = 0;
    while (gathered < bytes && count < most) {
        size_t piece = 0;
        uint8_t *values = dss_segments_at(&operation->segments, at + gathered, &piece);
        piece = piece < bytes - gathered ? piece : bytes - gathered;
        list[count++] = (struct iovec){.iov_base = values, .iov_len = piece};
        gathered += piece;
    }
    *count_p = count;
    return gathered;
}

/* ---- reducing ----------------------------------------------------------------------------------------------------------- */

/* How many bytes of the member's values may be reduced by now. */
static uint64_t reducible(const dss_member_t *member) {
    const dss_operation_t *operation = member->operation;
    if (operation->algorithm == DSS_PAIR)
        return member->sent[DSS_PHASE_REDUCE];
    if (operation->algorithm == DSS_FLAT)
        return member->receive_goal[DSS_PHASE_REDUCE];
    for (uint32_t i = member->index; i-- > 0;) /* the member whose turn is before */
        if (i != operation->own_index)
            return operation->members[i].applied;
    return operation->shard_bytes;
}

static bool is_last(const dss_member_t *member) {
    const dss_operation_t *operation = member->operation;
    const uint32_t last = operation->member_count - 1;
    return member->index == (operation->own_index == last ? last - 1 : last);
}

static bool is_first(const dss_member_t *member) {
    return member->index == (member->operation->own_index == 0 ? 1u : 0u);
}

static void reduce_pair(dss_member_t *member, const uint8_t *theirs, uint8_t *own, size_t bytes) {
    const dss_operation_t *operation = member->operation;
    const bool first = operation->own_index < member->index;
    (void)dss_combine(operation->dtype, operation->reduction, first ? own : theirs, first ? theirs : own, operation->scale, own,
                      bytes / element_bytes(operation));
}

static void reduce_shard(dss_member_t *member, uint64_t offset, const uint8_t *theirs, uint8_t *own, size_t bytes) {
    dss_operation_t *operation = member->operation;
    const size_t count = bytes / element_bytes(operation);
    uint8_t *sum = own;
    if (is_widened(operation)) {
        sum = operation->scratch + offset / element_bytes(operation) * dss_dtype_bytes(accumulator(operation));
        if (is_first(member))
            (void)dss_widen(operation->dtype, own, sum, count);
    }
    (void)dss_accumulate(operation->dtype, operation->reduction, theirs, sum, count);
    if (is_last(member) && (sum != own || operation->kind == DSS_OPERATION_AVERAGE))
        (void)dss_narrow_scaled(operation->dtype, sum, operation->scale, own, count);
}

static void reduce_all(dss_operation_t *operation) {
    const size_t bytes = (size_t)operation->segments.bytes;
    const size_t count = bytes / element_bytes(operation);
    uint8_t *sum = operation->scratch + operation->member_count * bytes;
    (void)dss_widen(operation->dtype, operation->scratch, sum, count);
    for (uint32_t i = 1; i < operation->member_count; i++)
        (void)dss_accumulate(operation->dtype, operation->reduction, operation->scratch + i * bytes, sum, count);
    (void)dss_narrow_scaled(operation->dtype, sum, operation->scale, operation->scratch, count);
    const uint8_t *result = operation->scratch;
    for (uint64_t at = 0; at < bytes;) {
        size_t piece = 0;
        uint8_t *values = dss_segments_at(&operation->segments, at, &piece);
        memcpy(values, result + at, piece);
        at += piece;
    }
}

/* From `applied` on; how many bytes were used. */
static size_t apply(dss_member_t *member, const uint8_t *bytes, size_t bytes_count) {
    dss_operation_t *operation = member->operation;
    const uint64_t limit = reducible(member);
    const uint64_t possible = limit > member->applied ? limit - member->applied : 0;
    size_t usable = possible < bytes_count ? (size_t)possible : bytes_count;
    usable -= usable % element_bytes(operation);
    if (operation->algorithm == DSS_FLAT) {
        memcpy(operation->scratch + member->index * operation->segments.bytes + member->applied, bytes, usable);
        member->applied += usable;
        return usable;
    }
    for (size_t used = 0; used < usable;) {
        size_t piece = 0;
        uint8_t *own = dss_segments_at(&operation->segments, operation->shard_at + member->applied, &piece);
        piece = piece < usable - used ? piece : usable - used;
        if (operation->algorithm == DSS_PAIR)
            reduce_pair(member, bytes + used, own, piece);
        else
            reduce_shard(member, member->applied, bytes + used, own, piece);
        member->applied += piece;
        used += piece;
    }
    if (usable > 0 && operation->algorithm == DSS_SHARDED && is_last(member)) {
        operation->reduced = member->applied;
        for (uint32_t i = 0; i < operation->member_count; i++)
            if (i != operation->own_index)
                dss_peer_queue(&operation->members[i]);
    }
    return usable;
}

static void gathered(dss_member_t *member, const uint8_t *bytes, size_t bytes_count) {
    const dss_operation_t *operation = member->operation;
    const uint64_t begin = dss_operation_shard_at(operation, member->index) + member->received[DSS_PHASE_GATHER];
    for (size_t used = 0; used < bytes_count;) {
        size_t piece = 0;
        uint8_t *own = dss_segments_at(&operation->segments, begin + used, &piece);
        piece = piece < bytes_count - used ? piece : bytes_count - used;
        memcpy(own, bytes + used, piece);
        used += piece;
    }
}

size_t dss_operation_take(dss_member_t *member, dss_phase_t phase, const uint8_t *bytes, size_t bytes_count) {
    size_t used = bytes_count;
    if (phase == DSS_PHASE_GATHER)
        gathered(member, bytes, bytes_count);
    else if (member->staged.begin < member->staged.end)
        used = 0; /* what came first goes first */
    else
        used = apply(member, bytes, bytes_count);
    member->received[phase] += used;
    return used;
}

bool dss_operation_stage(dss_member_t *member, const uint8_t *bytes, size_t bytes_count) {
    if (!dss_bytes_append(&member->staged, bytes, bytes_count))
        return false;
    member->received[DSS_PHASE_REDUCE] += bytes_count;
    member->operation->staged = true;
    member->operation->engine->any_staged = true;
    return true;
}

bool dss_operation_unstage(dss_operation_t *operation) {
    bool used = false;
    operation->staged = false;
    for (uint32_t i = 0; i < operation->member_count; i++) {
        dss_member_t *member = &operation->members[i];
        dss_bytes_t *staged = &member->staged;
        if (staged->begin == staged->end)
            continue;
        const size_t bytes = apply(member, staged->bytes + staged->begin, staged->end - staged->begin);
        used = used || bytes > 0;
        staged->begin += bytes;
        if (staged->begin == staged->end)
            dss_bytes_release(staged);
        else
            operation->staged = true;
    }
    return used;
}

void dss_operation_check(dss_operation_t *operation) {
    if (operation->completed)
        return;
    for (uint32_t i = 0; i < operation->member_count; i++) {
        const dss_member_t *member = &operation->members[i];
        if (i == operation->own_index)
            continue;
        if (!member->opened || member->applied < member->receive_goal[DSS_PHASE_REDUCE])
            return;
        for (int phase = DSS_PHASE_REDUCE; phase <= DSS_PHASE_GATHER; phase++)
            if (member->sent[phase] < member->send_goal[phase] || member->received[phase] < member->receive_goal[phase])
                return;
    }
    if (operation->algorithm == DSS_FLAT && operation->segments.bytes > 0)
        reduce_all(operation);
    dss_operation_complete(operation, DSS_OK, NULL);
}

void dss_signature_describe(const dss_signature_t *signature, char *text, size_t capacity) {
    if (signature->kind == DSS_OPERATION_BARRIER)
        (void)snprintf(text, capacity, "barrier over %u ranks", signature->member_count);
    else
        (void)snprintf(text, capacity, "%s%s of %llu x %s over %u ranks",
                       signature->kind == DSS_OPERATION_AVERAGE ? "average" : "all_reduce ",
                       signature->kind == DSS_OPERATION_AVERAGE ? "" : dss_reduction_name(signature->reduction),
                       (unsigned long long)signature->element_count, dss_dtype_name(signature->dtype), signature->member_count);
}
