/*
 * Who sends which values to whom, and what becomes of those that come.
 *
 * A pair reduces both ways at once: each value that comes is reduced into the own one, but not before that has been sent.
 * Larger groups reduce in one fixed order (the shard's owner first, then ascending ranks), whatever the order of arrival, so that a
 * result does not depend on chance; what comes before its turn is staged.
 */
#include "copy.h"
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GATHER_PIECE DSS_BOARD_SLOT_BYTES /* results travel in pieces not smaller than this, but for the last */
#define BOARD_LEAST ((size_t)16 << 10)    /* less is sooner copied into each ring */

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
    return dss_stripe_begin(operation->element_count, operation->member_count, index) * element_bytes(operation);
}

/* On one host, or few in one rack, if racks are known: no link between is shared that a ring would spare. */
static bool is_in_one_place(const dss_operation_t *operation) {
    const dss_engine_t *engine = operation->engine;
    const uint32_t own = engine->identity.rank;
    const bool knows_racks = engine->has_racks && operation->member_count <= DSS_STRAIGHT_MEMBERS;
    for (uint32_t i = 0; i < operation->member_count; i++) {
        const dss_peer_t *peer = operation->members[i].peer;
        if (peer && !peer->same_host && (!knows_racks || engine->racks[peer->rank] != engine->racks[own]))
            return false;
    }
    return true;
}

static dss_algorithm_t choose(const dss_operation_t *operation) {
    if (operation->skips[DSS_PHASE_REDUCE] || operation->skips[DSS_PHASE_GATHER])
        return DSS_SHARDED;
    if (dss_is_crossing(operation->kind) && !operation->parent)
        return DSS_HIERARCHY;
    if (operation->member_count == 1)
        return DSS_ALONE;
    if (operation->member_count == 2)
        return DSS_PAIR;
    if (operation->segments.bytes <= (operation->parent ? DSS_FLAT_STAGE_BYTES : DSS_FLAT_BYTES))
        return DSS_FLAT;
    if (operation->segments.bytes >= DSS_RING_FROM_BYTES && !operation->parent && dss_hierarchy_fits(operation))
        return DSS_HIERARCHY;
    return operation->segments.bytes >= DSS_RING_FROM_BYTES && !is_in_one_place(operation) ? DSS_RING : DSS_SHARDED;
}

/* Of an element in the phase: partial sums of half types travel in float32 round a ring. */
static size_t width(const dss_operation_t *operation, dss_phase_t phase) {
    const bool widened = operation->algorithm == DSS_RING && phase == DSS_PHASE_REDUCE;
    return widened ? dss_dtype_bytes(accumulator(operation)) : element_bytes(operation);
}

static bool make_scratch(dss_operation_t *operation) {
    const uint64_t bytes = operation->segments.bytes;
    const size_t widening = is_widened(operation) ? dss_dtype_bytes(accumulator(operation)) / element_bytes(operation) : 1;
    size_t needed = 0;
    if (operation->algorithm == DSS_FLAT)
        needed = (size_t)(operation->member_count * bytes + widening * bytes);
    else if (operation->algorithm == DSS_SHARDED && widening > 1)
        needed = (size_t)(widening * operation->shard_bytes);
    else if (operation->algorithm == DSS_RING && widening > 1)
        needed = (size_t)(widening * bytes);
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

static bool is_before(const dss_operation_t *operation, uint32_t one, uint32_t other) {
    const uint32_t *hosts = operation->engine->hosts;
    const uint32_t rank = operation->engine->identity.rank;
    const uint32_t first = one == operation->own_index ? rank : operation->members[one].peer->rank;
    const uint32_t second = other == operation->own_index ? rank : operation->members[other].peer->rank;
    return hosts[first] != hosts[second] ? hosts[first] < hosts[second] : first < second;
}

static uint64_t shard_elements(const dss_operation_t *operation, uint32_t position) {
    return (dss_operation_shard_at(operation, position + 1) - dss_operation_shard_at(operation, position)) /
           element_bytes(operation);
}

/* All shards but the one that comes last when going down from `first`: what travels over each link of the ring in a phase. */
static uint64_t ring_goal(const dss_operation_t *operation, uint32_t first, dss_phase_t phase) {
    const uint32_t left_out = (first + 1) % operation->member_count;
    return (operation->element_count - shard_elements(operation, left_out)) * width(operation, phase);
}

static void plan_ring(dss_operation_t *operation) {
    const uint32_t count = operation->member_count;
    uint32_t first = 0; /* members in the order of hosts, then ranks */
    uint32_t last = 0;
    uint32_t next = count;
    uint32_t previous = count;
    for (uint32_t i = 0; i < count; i++) {
        first = is_before(operation, i, first) ? i : first;
        last = is_before(operation, last, i) ? i : last;
        if (is_before(operation, i, operation->own_index)) {
            operation->position++;
            previous = previous == count || is_before(operation, previous, i) ? i : previous;
        } else if (i != operation->own_index) {
            next = next == count || is_before(operation, i, next) ? i : next;
        }
    }
    const uint32_t own = operation->position;
    operation->next_in_ring = &operation->members[next == count ? first : next];
    operation->previous_in_ring = &operation->members[previous == count ? last : previous];
    for (uint32_t i = 0; i < count; i++)
        if (&operation->members[i] != operation->next_in_ring && &operation->members[i] != operation->previous_in_ring)
            operation->members[i].peer = NULL;
    const uint32_t complete = (own + 1) % count;
    operation->shard_bytes = shard_elements(operation, complete) * element_bytes(operation);
    operation->next_in_ring->send_goal[DSS_PHASE_REDUCE] = ring_goal(operation, own, DSS_PHASE_REDUCE);
    operation->next_in_ring->send_goal[DSS_PHASE_GATHER] = ring_goal(operation, complete, DSS_PHASE_GATHER);
    operation->previous_in_ring->receive_goal[DSS_PHASE_REDUCE] = ring_goal(operation, (own + count - 1) % count, DSS_PHASE_REDUCE);
    operation->previous_in_ring->receive_goal[DSS_PHASE_GATHER] = ring_goal(operation, own, DSS_PHASE_GATHER);
}

static void plan_direct(dss_operation_t *operation) {
    const uint64_t bytes = operation->segments.bytes;
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
        for (int phase = DSS_PHASE_REDUCE; phase <= DSS_PHASE_GATHER; phase++)
            if (operation->skips[phase])
                member->send_goal[phase] = member->receive_goal[phase] = 0;
    }
    if (operation->skips[DSS_PHASE_REDUCE])
        operation->reduced = operation->shard_bytes;
}

/* Where two others or more share this host, all read one copy of its shard. False when memory is out. */
static bool plan_board(dss_operation_t *operation) {
    uint32_t neighbours = 0;
    for (uint32_t i = 0; i < operation->member_count; i++)
        neighbours += operation->members[i].peer && operation->members[i].peer->same_host;
    if (operation->algorithm != DSS_SHARDED || operation->skips[DSS_PHASE_GATHER] || neighbours < 2 ||
        operation->shard_bytes < BOARD_LEAST)
        return true;
    operation->posted = calloc((size_t)(operation->shard_bytes / DSS_BOARD_SLOT_BYTES) + 1, 1);
    return operation->posted != NULL;
}

bool dss_operation_plan(dss_operation_t *operation) {
    const size_t bytes = (size_t)operation->segments.bytes;
    operation->algorithm = choose(operation);
    if (operation->algorithm == DSS_HIERARCHY)
        return true;
    if (operation->algorithm == DSS_RING)
        plan_ring(operation);
    else
        plan_direct(operation);
    if (!make_scratch(operation) || !plan_board(operation))
        return false;
    if (operation->algorithm == DSS_FLAT)
        copy_out(&operation->segments, 0, operation->scratch + operation->own_index * bytes, bytes);
    for (size_t at = 0; operation->algorithm == DSS_RING && operation->scratch && at < bytes;) {
        size_t piece = 0;
        const uint8_t *values = dss_segments_at(&operation->segments, at, &piece);
        (void)dss_widen(operation->dtype, values,
                        operation->scratch + at / element_bytes(operation) * width(operation, DSS_PHASE_REDUCE),
                        piece / element_bytes(operation));
        at += piece;
    }
    return true;
}

/* Where byte `offset` of the shards first, first-1, ... lies: the element, and how many elements follow in its shard. */
static uint64_t ring_at(const dss_operation_t *operation, uint32_t first, uint64_t offset, size_t width_bytes,
                        uint64_t *elements_p) {
    uint64_t element = offset / width_bytes;
    uint32_t shard = first;
    while (element >= shard_elements(operation, shard)) {
        element -= shard_elements(operation, shard);
        shard = (shard + operation->member_count - 1) % operation->member_count;
    }
    *elements_p = shard_elements(operation, shard) - element;
    return dss_operation_shard_at(operation, shard) / element_bytes(operation) + element;
}

/* Whether so many bytes are whole shards first, first-1, ... */
static bool is_whole_shards(const dss_operation_t *operation, uint32_t first, uint64_t bytes, size_t width_bytes) {
    const uint64_t before = bytes / width_bytes;
    uint64_t sum = 0;
    for (uint32_t i = 0; sum < before; i++)
        sum += shard_elements(operation, (first + operation->member_count - i) % operation->member_count);
    return sum == before && bytes % width_bytes == 0;
}

/* ---- the board --------------------------------------------------------------------------------------------------------- */

/* Once for an operation, before any of its results is sent: who begins to see the board later has not been counted. */
static void decide_readers(dss_operation_t *operation) {
    for (uint32_t i = 0; !operation->has_readers && i < operation->member_count; i++)
        operation->members[i].reads = operation->members[i].peer && operation->members[i].peer->sees;
    operation->has_readers = true;
}

/* How many members are still to be told of the piece that begins at `offset`. */
static uint32_t readers_of(const dss_operation_t *operation, uint64_t offset) {
    uint32_t readers = 0;
    for (uint32_t i = 0; i < operation->member_count; i++)
        readers += operation->members[i].reads && operation->members[i].gathered <= offset;
    return readers;
}

/* Copies a piece of the own shard to a free slot, if there is one and it pays. */
static void fill_slot(dss_operation_t *operation, uint64_t offset, size_t bytes) {
    const uint32_t readers = readers_of(operation, offset);
    const int slot = readers < 2 || bytes < BOARD_LEAST ? -1 : dss_board_take(operation->engine->board, readers);
    if (slot < 0)
        return;
    uint8_t *target = dss_board_slot(operation->engine->board, (uint32_t)slot);
    for (uint64_t at = operation->shard_at + offset; bytes > 0;) {
        size_t piece = 0;
        const uint8_t *values = dss_segments_at(&operation->segments, at, &piece);
        piece = piece < bytes ? piece : bytes;
        memcpy(target, values, piece);
        target += piece;
        at += piece;
        bytes -= piece;
    }
    operation->posted[offset / DSS_BOARD_SLOT_BYTES] = (uint8_t)(slot + 1);
}

int dss_operation_post(dss_member_t *member, size_t *bytes_p) {
    dss_operation_t *operation = member->operation;
    const uint64_t offset = member->sent[DSS_PHASE_GATHER];
    if (!operation->posted)
        return -1;
    decide_readers(operation);
    if (!member->reads)
        return -1;
    *bytes_p = *bytes_p < DSS_BOARD_SLOT_BYTES ? *bytes_p : DSS_BOARD_SLOT_BYTES;
    const uint8_t *posted = &operation->posted[offset / DSS_BOARD_SLOT_BYTES];
    if (*posted == 0)
        fill_slot(operation, offset, *bytes_p);
    return *posted - 1;
}

void dss_operation_unpost(const dss_member_t *member) {
    const dss_operation_t *operation = member->operation;
    if (!member->reads)
        return;
    const uint64_t begin = (member->gathered + DSS_BOARD_SLOT_BYTES - 1) / DSS_BOARD_SLOT_BYTES;
    for (uint64_t i = begin; i * DSS_BOARD_SLOT_BYTES < operation->shard_bytes; i++)
        if (operation->posted[i])
            dss_board_give(operation->engine->board, operation->posted[i] - 1u);
}

/* ---- sending ------------------------------------------------------------------------------------------------------------ */

static uint64_t sendable_in_ring(const dss_member_t *member, dss_phase_t *phase_p) {
    const dss_operation_t *operation = member->operation;
    const dss_member_t *previous = operation->previous_in_ring;
    if (member != operation->next_in_ring)
        return 0;
    *phase_p = member->sent[DSS_PHASE_REDUCE] < member->send_goal[DSS_PHASE_REDUCE] ? DSS_PHASE_REDUCE : DSS_PHASE_GATHER;
    const uint64_t goal = member->send_goal[*phase_p];
    uint64_t there = operation->reduced;
    if (*phase_p == DSS_PHASE_REDUCE)
        there = shard_elements(operation, operation->position) * width(operation, DSS_PHASE_REDUCE) + previous->applied;
    else if (operation->reduced == operation->shard_bytes)
        there += previous->received[DSS_PHASE_GATHER];
    there = there < goal ? there : goal;
    const uint64_t sent = member->sent[*phase_p];
    const uint32_t first = *phase_p == DSS_PHASE_REDUCE ? operation->position : (operation->position + 1) % operation->member_count;
    /* The end of a shard goes at once, however little it is: what comes next may depend on it, all the way round. */
    const bool goes = there - sent >= GATHER_PIECE || is_whole_shards(operation, first, there, width(operation, *phase_p));
    return goes ? there - sent : 0;
}

uint64_t dss_operation_sendable(const dss_member_t *member, dss_phase_t *phase_p) {
    if (!member->opened && !member->eager)
        return 0;
    if (member->operation->algorithm == DSS_RING)
        return sendable_in_ring(member, phase_p);
    *phase_p = DSS_PHASE_REDUCE;
    const uint64_t own = member->send_goal[DSS_PHASE_REDUCE] - member->sent[DSS_PHASE_REDUCE];
    if (own > 0)
        return own;
    *phase_p = DSS_PHASE_GATHER;
    const uint64_t left = member->send_goal[DSS_PHASE_GATHER] - member->sent[DSS_PHASE_GATHER];
    const uint64_t reduced = left == 0 ? 0 : member->operation->reduced - member->sent[DSS_PHASE_GATHER];
    return reduced == left ? left : reduced / GATHER_PIECE * GATHER_PIECE; /* so that they are pieces of the board, too */
}

/* One piece round a ring. */
static struct iovec ring_piece(const dss_operation_t *operation, dss_phase_t phase, uint64_t offset, size_t bytes) {
    const size_t width_bytes = width(operation, phase);
    const uint32_t first = phase == DSS_PHASE_REDUCE ? operation->position : (operation->position + 1) % operation->member_count;
    uint64_t elements = 0;
    const uint64_t element = ring_at(operation, first, offset, width_bytes, &elements);
    const size_t within = (size_t)(offset % width_bytes); /* the stream may have taken a part of an element */
    size_t piece = (size_t)elements * width_bytes - within;
    uint8_t *values = operation->scratch ? operation->scratch + element * width_bytes : NULL;
    if (phase == DSS_PHASE_GATHER || !values) {
        size_t contiguous = 0;
        values = dss_segments_at(&operation->segments, element * width_bytes, &contiguous);
        piece = piece + within < contiguous ? piece : contiguous - within;
    }
    return (struct iovec){.iov_base = values + within, .iov_len = piece < bytes ? piece : bytes};
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
    while (operation->algorithm == DSS_RING && gathered < bytes && count < most) {
        list[count] = ring_piece(operation, phase, offset + gathered, bytes - gathered);
        gathered += list[count++].iov_len;
    }
    while (operation->algorithm != DSS_RING && gathered < bytes && count < most) {
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
    if (operation->algorithm == DSS_FLAT || operation->algorithm == DSS_RING)
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
    if (is_last(member) && (sum != own || operation->scale != 1.0))
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

/* Partial sums from the previous member, up to the end of a shard or of an array; how many elements were used. */
static size_t reduce_in_ring(dss_member_t *member, const uint8_t *theirs, size_t most) {
    dss_operation_t *operation = member->operation;
    const uint32_t count = operation->member_count;
    const size_t width_bytes = width(operation, DSS_PHASE_REDUCE);
    uint64_t elements = 0;
    const uint64_t element = ring_at(operation, (operation->position + count - 1) % count, member->applied, width_bytes, &elements);
    size_t piece = 0;
    uint8_t *own = dss_segments_at(&operation->segments, element * element_bytes(operation), &piece);
    piece /= element_bytes(operation);
    piece = piece < elements ? piece : (size_t)elements;
    piece = piece < most ? piece : most;
    uint8_t *sum = operation->scratch ? operation->scratch + element * width_bytes : own;
    (void)dss_accumulate(accumulator(operation), operation->reduction, theirs, sum, piece);
    const uint32_t complete = (operation->position + 1) % count;
    if (element >= dss_operation_shard_at(operation, complete) / element_bytes(operation) &&
        element < dss_operation_shard_at(operation, complete + 1) / element_bytes(operation)) {
        if (sum != own || operation->scale != 1.0)
            (void)dss_narrow_scaled(operation->dtype, sum, operation->scale, own, piece);
        operation->reduced += piece * element_bytes(operation);
    }
    return piece;
}

/* From `applied` on; how many bytes were used. */
static size_t apply(dss_member_t *member, const uint8_t *bytes, size_t bytes_count) {
    dss_operation_t *operation = member->operation;
    const uint64_t limit = reducible(member);
    const uint64_t possible = limit > member->applied ? limit - member->applied : 0;
    size_t usable = possible < bytes_count ? (size_t)possible : bytes_count;
    usable -= usable % width(operation, DSS_PHASE_REDUCE);
    for (size_t used = 0; operation->algorithm == DSS_RING && used < usable;) {
        const size_t width_bytes = width(operation, DSS_PHASE_REDUCE);
        const size_t taken = width_bytes * reduce_in_ring(member, bytes + used, (usable - used) / width_bytes);
        member->applied += taken;
        used += taken;
    }
    if (operation->algorithm == DSS_RING) {
        dss_peer_queue(operation->next_in_ring);
        return usable;
    }
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

static void gathered_in_ring(dss_member_t *member, const uint8_t *bytes, size_t bytes_count) {
    const dss_operation_t *operation = member->operation;
    const size_t width_bytes = element_bytes(operation);
    for (size_t used = 0; used < bytes_count;) {
        uint64_t elements = 0;
        const uint64_t element =
            ring_at(operation, operation->position, member->received[DSS_PHASE_GATHER] + used, width_bytes, &elements);
        size_t piece = 0;
        uint8_t *own = dss_segments_at(&operation->segments, element * width_bytes, &piece);
        piece = piece < elements * width_bytes ? piece : (size_t)(elements * width_bytes);
        piece = piece < bytes_count - used ? piece : bytes_count - used;
        memcpy(own, bytes + used, piece);
        used += piece;
    }
    dss_peer_queue(operation->next_in_ring);
}

static void gathered(dss_member_t *member, const uint8_t *bytes, size_t bytes_count) {
    const dss_operation_t *operation = member->operation;
    if (operation->algorithm == DSS_RING) {
        gathered_in_ring(member, bytes, bytes_count);
        return;
    }
    const uint64_t begin = dss_operation_shard_at(operation, member->index) + member->received[DSS_PHASE_GATHER];
    for (size_t used = 0; used < bytes_count;) {
        size_t piece = 0;
        uint8_t *own = dss_segments_at(&operation->segments, begin + used, &piece);
        piece = piece < bytes_count - used ? piece : bytes_count - used;
        if (operation->engine->has_many_neighbours)
            dss_copy_streaming(own, bytes + used, piece);
        else
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
        if (!member->peer)
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
    else if (dss_is_crossing((dss_operation_kind_t)signature->kind))
        (void)snprintf(text, capacity, "crossing of %s%llu x %s over %u ranks",
                       signature->kind == DSS_OPERATION_CROSSING_OF_MEANS ? "means, " : "",
                       (unsigned long long)signature->element_count, dss_dtype_name(signature->dtype), signature->member_count);
    else
        (void)snprintf(text, capacity, "%s%s of %llu x %s over %u ranks",
                       signature->kind == DSS_OPERATION_AVERAGE ? "average" : "all_reduce ",
                       signature->kind == DSS_OPERATION_AVERAGE ? "" : dss_reduction_name(signature->reduction),
                       (unsigned long long)signature->element_count, dss_dtype_name(signature->dtype), signature->member_count);
}
