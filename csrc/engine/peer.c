/*
 * Frames to and from one peer.
 *
 * Output is made when there is room for it: control frames first, then one data frame after the other, taking turns between the
 * operations that have something to send. Values go from the caller's arrays into the stream without a copy in between, and, when
 * they come, are reduced where they lie in it.
 */
#include "engine.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "stream_shared.h"

#define LIST_COUNT 24 /* pieces in one write */

static const uint8_t zeros[DSS_FRAME_ALIGNMENT];

/* ---- bytes -------------------------------------------------------------------------------------------------------------- */

bool dss_bytes_append(dss_bytes_t *bytes, const void *more, size_t more_count) {
    if (more_count == 0)
        return true;
    if (bytes->begin > 0 && bytes->end + more_count > bytes->capacity) {
        memmove(bytes->bytes, bytes->bytes + bytes->begin, bytes->end - bytes->begin);
        bytes->end -= bytes->begin;
        bytes->begin = 0;
    }
    if (bytes->end + more_count > bytes->capacity) {
        const size_t capacity = 2 * bytes->capacity > bytes->end + more_count ? 2 * bytes->capacity : bytes->end + more_count;
        uint8_t *larger = realloc(bytes->bytes, capacity);
        if (!larger)
            return false;
        bytes->bytes = larger;
        bytes->capacity = capacity;
    }
    memcpy(bytes->bytes + bytes->end, more, more_count);
    bytes->end += more_count;
    return true;
}

void dss_bytes_release(dss_bytes_t *bytes) {
    free(bytes->bytes);
    *bytes = (dss_bytes_t){0};
}

/* ---- coming and going --------------------------------------------------------------------------------------------------- */

const char *dss_peer_text(const dss_peer_t *peer, char *text, size_t capacity) {
    char address[DSS_ADDRESS_TEXT_BYTES];
    (void)snprintf(text, capacity, "rank %u (%s%s%s)", peer->rank, dss_address_text(&peer->address, address),
                   peer->stream ? ", " : "", peer->stream ? peer->stream->ops->name : "");
    return text;
}

void dss_peer_ready(dss_peer_t *peer, dss_stream_t *stream) {
    dss_engine_t *engine = peer->engine;
    peer->state = DSS_PEER_READY;
    peer->redial_ns = 0;
    peer->stream = stream;
    peer->watch = (dss_watch_t){.kind = DSS_WATCH_PEER, .fd = stream->fd, .owner = peer};
    peer->out_watch =
        (dss_watch_t){.kind = DSS_WATCH_PEER, .fd = stream->out_fd == stream->fd ? -1 : stream->out_fd, .owner = peer};
    dss_watch_set(engine, &peer->watch, EPOLLIN);
    engine->ready[engine->ready_count++] = peer->rank;
    if (engine->aborted) /* meanwhile: it has to hear of that */
        dss_peer_say_goodbye(peer);
    for (dss_member_t *member = peer->operations; member && peer->state == DSS_PEER_READY; member = member->next_of_peer)
        dss_member_announce(member);
}

void dss_member_announce(dss_member_t *member) {
    const dss_operation_t *operation = member->operation;
    const dss_frame_t frame = {.type = DSS_FRAME_OPEN, .payload_bytes = DSS_SIGNATURE_BYTES, .key = operation->key};
    uint8_t payload[DSS_SIGNATURE_BYTES];
    dss_signature_encode(&operation->signature, payload);
    dss_peer_say(member->peer, &frame, payload);
}

static void leave_ready(dss_peer_t *peer) {
    dss_engine_t *engine = peer->engine;
    for (uint32_t i = 0; i < engine->ready_count; i++)
        if (engine->ready[i] == peer->rank) {
            engine->ready[i] = engine->ready[--engine->ready_count];
            return;
        }
}

static void close_stream(dss_peer_t *peer) {
    if (!peer->stream)
        return;
    dss_watch_set(peer->engine, &peer->watch, 0);
    dss_watch_set(peer->engine, &peer->out_watch, 0);
    peer->stream->ops->close(peer->stream);
    peer->stream = NULL;
    peer->watch.fd = -1;
    peer->out_watch.fd = -1;
    leave_ready(peer);
}

/* What is received and not reduced yet needs the peer no more. */
static bool is_finished(const dss_member_t *member) {
    return member->opened && member->received[DSS_PHASE_REDUCE] == member->receive_goal[DSS_PHASE_REDUCE] &&
           member->received[DSS_PHASE_GATHER] == member->receive_goal[DSS_PHASE_GATHER] &&
           member->sent[DSS_PHASE_REDUCE] == member->send_goal[DSS_PHASE_REDUCE] &&
           member->sent[DSS_PHASE_GATHER] == member->send_goal[DSS_PHASE_GATHER];
}

static dss_member_t *first_unfinished(const dss_peer_t *peer) {
    dss_member_t *member = peer->operations;
    while (member && is_finished(member))
        member = member->next_of_peer;
    return member;
}

void dss_peer_lose(dss_peer_t *peer, const char *format, ...) {
    if (peer->state == DSS_PEER_LOST)
        return;
    char who[160];
    char cause[640];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(cause, sizeof cause, format, arguments);
    va_end(arguments);
    char text[sizeof who + sizeof cause];
    (void)snprintf(text, sizeof text, "%s %s", dss_peer_text(peer, who, sizeof who), cause);
    const char *phase = peer->state == DSS_PEER_READY ? "transfer" : "connect";
    close_stream(peer);
    dss_connect_forget(peer);
    peer->state = DSS_PEER_LOST;
    peer->lost = dss_text_copy(text);
    peer->engine->stats.lost_peers++;
    for (dss_member_t *member = first_unfinished(peer); member; member = first_unfinished(peer))
        dss_operation_fail(member->operation, DSS_ERR_PEER_LOST, phase, text);
    for (dss_member_t *member = peer->operations, *next = NULL; member; member = next) { /* lost in the padding of a last frame */
        next = member->next_of_peer;
        dss_operation_check(member->operation);
    }
}

void dss_ahead_destroy(dss_ahead_t *ahead) {
    dss_bytes_release(&ahead->eager);
    free(ahead);
}

void dss_peer_release(dss_peer_t *peer) {
    close_stream(peer);
    dss_bytes_release(&peer->control);
    dss_bytes_release(&peer->rest);
    for (uint32_t i = 0; i < DSS_AHEAD_BUCKETS; i++)
        while (peer->ahead[i]) {
            dss_ahead_t *next = peer->ahead[i]->next;
            dss_ahead_destroy(peer->ahead[i]);
            peer->ahead[i] = next;
        }
    dss_board_destroy(peer->board);
    peer->board = NULL;
    free(peer->lost);
    peer->lost = NULL;
}

void dss_peer_queue(dss_member_t *member) {
    dss_peer_t *peer = member->peer;
    if (member->queued || peer->writing == member)
        return;
    member->queued = true;
    member->next_sender = NULL;
    if (!peer->senders)
        peer->last_sender_p = &peer->senders;
    *peer->last_sender_p = member;
    peer->last_sender_p = &member->next_sender;
}

static void unqueue(dss_member_t *member) {
    dss_peer_t *peer = member->peer;
    for (dss_member_t **at = &peer->senders; *at; at = &(*at)->next_sender)
        if (*at == member) {
            *at = member->next_sender;
            if (!*at)
                peer->last_sender_p = at;
            break;
        }
    member->queued = false;
}

/* A frame that was begun is finished with its own values: its reader may need no more than these to complete. */
static void keep_rest(dss_peer_t *peer) {
    struct iovec list[LIST_COUNT];
    const dss_member_t *member = peer->writing;
    uint64_t at = member->sent[peer->writing_phase];
    for (size_t left = peer->payload_left; left > 0;) {
        int count = 0;
        const size_t bytes = dss_operation_gather(member, peer->writing_phase, at, left, list, LIST_COUNT, &count);
        for (int i = 0; i < count; i++)
            if (!dss_bytes_append(&peer->rest, list[i].iov_base, list[i].iov_len))
                return; /* write_out() notices */
        at += bytes;
        left -= bytes;
    }
}

static void begin_measuring(dss_member_t *member) {
    dss_peer_t *peer = member->peer;
    if (is_finished(member))
        return;
    member->measured = true;
    if (peer->busy++ == 0)
        peer->busy_since_ns = dss_now_ns();
}

static void end_measuring(dss_member_t *member) {
    dss_peer_t *peer = member->peer;
    if (!member->measured)
        return;
    member->measured = false;
    peer->transfer_bytes += member->received[DSS_PHASE_REDUCE] + member->received[DSS_PHASE_GATHER];
    if (--peer->busy == 0)
        peer->transfer_ns += dss_now_ns() - peer->busy_since_ns;
}

void dss_peer_forget(dss_member_t *member) {
    dss_peer_t *peer = member->peer;
    if (!peer || !member->previous_of_peer_p)
        return;
    end_measuring(member);
    if (member->queued)
        unqueue(member);
    if (peer->reading == member)
        peer->reading = NULL;
    if (peer->writing == member) {
        if (peer->state == DSS_PEER_READY)
            keep_rest(peer);
        peer->writing = NULL;
    }
    if (member->eager)
        peer->eager_sent -= (size_t)member->send_goal[DSS_PHASE_REDUCE];
    dss_operation_unpost(member);
    *member->previous_of_peer_p = member->next_of_peer;
    if (member->next_of_peer)
        member->next_of_peer->previous_of_peer_p = member->previous_of_peer_p;
    member->previous_of_peer_p = NULL;
    dss_bytes_release(&member->staged);
}

/* ---- writing ------------------------------------------------------------------------------------------------------------ */

static size_t padding_of(size_t payload_bytes) {
    return (DSS_FRAME_ALIGNMENT - payload_bytes % DSS_FRAME_ALIGNMENT) % DSS_FRAME_ALIGNMENT;
}

void dss_peer_say(dss_peer_t *peer, const dss_frame_t *frame, const void *payload) {
    uint8_t header[DSS_FRAME_BYTES];
    if (peer->state == DSS_PEER_LOST)
        return;
    dss_frame_encode(frame, (uint32_t)peer->engine->identity.epoch, header);
    const size_t before = peer->control.end;
    if (!dss_bytes_append(&peer->control, header, sizeof header) ||
        !dss_bytes_append(&peer->control, payload, frame->payload_bytes) ||
        !dss_bytes_append(&peer->control, zeros, padding_of(frame->payload_bytes))) {
        peer->control.end = before < peer->control.end ? before : peer->control.end;
        dss_peer_lose(peer, "cannot be told anything: out of memory");
    }
}

void dss_peer_say_goodbye(dss_peer_t *peer) {
    const dss_frame_t goodbye = {.type = DSS_FRAME_GOODBYE};
    dss_peer_say(peer, &goodbye, NULL);
}

void dss_peer_ask(dss_peer_t *peer) {
    const dss_frame_t ping = {.type = DSS_FRAME_PING};
    if (peer->asked || peer->state != DSS_PEER_READY)
        return;
    peer->asked = true;
    dss_peer_say(peer, &ping, NULL);
}

void dss_peer_show_board(dss_peer_t *peer) {
    dss_engine_t *engine = peer->engine;
    if (peer->tried || peer->state != DSS_PEER_READY)
        return;
    peer->tried = true;
    if (!engine->board && !engine->has_no_board)
        engine->has_no_board = dss_board_create(&engine->board, NULL) != DSS_OK;
    /* Where that fails, values go through the ring as before. */
    peer->shown = engine->board && dss_stream_shared_show(peer->stream, dss_board_memfd(engine->board));
}

void dss_peer_see_board(dss_peer_t *peer) {
    const dss_frame_t seen = {.type = DSS_FRAME_SEEN};
    const int memfd = dss_stream_shared_take_shown(peer->stream);
    if (memfd < 0)
        return;
    if (!peer->board && dss_board_open(memfd, &peer->board, NULL) == DSS_OK)
        dss_peer_say(peer, &seen, NULL);
    close(memfd);
}

/* Anything that comes is an answer: where much waits already, it need not be one of its own. */
static void answer(dss_peer_t *peer) {
    const dss_frame_t pong = {.type = DSS_FRAME_PONG};
    if (peer->control.end - peer->control.begin < DSS_FRAME_PAYLOAD)
        dss_peer_say(peer, &pong, NULL);
}

static bool in_output_frame(const dss_peer_t *peer) {
    return peer->header_left || peer->payload_left || peer->padding_left;
}

/* The next data frame, if any operation has something to send. */
static void begin_frame(dss_peer_t *peer) {
    while (peer->senders) {
        dss_member_t *member = peer->senders;
        dss_phase_t phase = DSS_PHASE_REDUCE;
        const uint64_t sendable = dss_operation_sendable(member, &phase);
        unqueue(member);
        if (sendable == 0)
            continue; /* queued again when there is something */
        size_t bytes = sendable < DSS_FRAME_PAYLOAD ? (size_t)sendable : DSS_FRAME_PAYLOAD;
        const int slot = phase == DSS_PHASE_GATHER ? dss_operation_post(member, &bytes) : -1;
        if (phase == DSS_PHASE_GATHER)
            member->gathered = member->sent[phase] + bytes;
        peer->payload_left = slot < 0 ? bytes : 0;
        peer->posted_bytes = slot < 0 ? 0 : bytes;
        peer->header_left = DSS_FRAME_BYTES;
        peer->padding_left = padding_of(peer->payload_left);
        peer->writing = member;
        peer->writing_phase = phase;
        const dss_frame_t frame = {.type = slot < 0 ? DSS_FRAME_DATA : DSS_FRAME_BOARD,
                                   .phase = phase,
                                   .payload_bytes = (uint32_t)bytes,
                                   .key = member->operation->key,
                                   .offset = member->sent[phase],
                                   .slot = slot < 0 ? 0 : (uint32_t)slot};
        dss_frame_encode(&frame, (uint32_t)peer->engine->identity.epoch, peer->header);
        return;
    }
}

/* Control frames may go only between data frames. */
static size_t control_now(const dss_peer_t *peer) {
    const bool between = peer->header_left == DSS_FRAME_BYTES || !in_output_frame(peer);
    return between ? peer->control.end - peer->control.begin : 0;
}

static int list_output(dss_peer_t *peer, struct iovec *list, size_t *bytes_p) {
    int count = 0;
    const size_t control = control_now(peer);
    if (control > 0)
        list[count++] = (struct iovec){.iov_base = peer->control.bytes + peer->control.begin, .iov_len = control};
    if (peer->header_left > 0)
        list[count++] =
            (struct iovec){.iov_base = peer->header + DSS_FRAME_BYTES - peer->header_left, .iov_len = peer->header_left};
    size_t payload = 0;
    int pieces = 0;
    if (peer->payload_left > 0 && peer->writing)
        payload = dss_operation_gather(peer->writing, peer->writing_phase, peer->writing->sent[peer->writing_phase],
                                       peer->payload_left, list + count, LIST_COUNT - count, &pieces);
    else if (peer->payload_left > 0) {
        payload = peer->payload_left;
        list[count + pieces++] = (struct iovec){.iov_base = peer->rest.bytes + peer->rest.begin, .iov_len = payload};
    }
    count += pieces;
    size_t padding = 0;
    if (payload == peer->payload_left && peer->padding_left > 0 && count < LIST_COUNT) {
        padding = peer->padding_left;
        list[count++] = (struct iovec){.iov_base = (void *)(uintptr_t)zeros, .iov_len = padding};
    }
    *bytes_p = control + peer->header_left + payload + padding;
    return count;
}

static void written(dss_peer_t *peer, size_t bytes) {
    peer->engine->stats.bytes_sent += bytes;
    const size_t control = control_now(peer) < bytes ? control_now(peer) : bytes;
    peer->control.begin += control;
    if (peer->control.begin == peer->control.end)
        peer->control.begin = peer->control.end = 0;
    bytes -= control;
    const size_t header = peer->header_left < bytes ? peer->header_left : bytes;
    peer->header_left -= header;
    bytes -= header;
    const size_t payload = peer->payload_left < bytes ? peer->payload_left : bytes;
    peer->payload_left -= payload;
    if (peer->writing)
        peer->writing->sent[peer->writing_phase] += payload;
    else if (payload > 0)
        peer->rest.begin += payload;
    peer->padding_left -= bytes - payload;
}

static void end_frame(dss_peer_t *peer) {
    dss_member_t *member = peer->writing;
    peer->writing = NULL;
    dss_bytes_release(&peer->rest);
    if (!member)
        return;
    member->sent[peer->writing_phase] += peer->posted_bytes;
    peer->engine->stats.bytes_sent += peer->posted_bytes;
    peer->engine->stats.board_bytes += peer->posted_bytes;
    if (is_finished(member))
        end_measuring(member);
    dss_peer_queue(member);
    dss_operation_check(member->operation);
}

static bool write_out(dss_peer_t *peer) {
    bool moved = false;
    peer->blocked = false;
    if (!peer->writing && peer->rest.end - peer->rest.begin < peer->payload_left) {
        dss_peer_lose(peer, "cannot be sent the rest of a frame: out of memory");
        return true;
    }
    for (size_t budget = DSS_PASS_BYTES; budget > 0;) {
        if (!in_output_frame(peer))
            begin_frame(peer);
        struct iovec list[LIST_COUNT];
        size_t bytes = 0;
        const int count = list_output(peer, list, &bytes);
        if (count == 0)
            return moved;
        const ssize_t taken = peer->stream->ops->write(peer->stream, list, count);
        if (taken < 0) {
            peer->blocked = true; /* what has come before the end is read first, and reading finds the same end */
            return moved;
        }
        moved = moved || taken > 0;
        written(peer, (size_t)taken);
        if (peer->header_left == 0 && peer->payload_left == 0)
            end_frame(peer); /* its padding concerns no operation */
        if ((size_t)taken < bytes) {
            peer->blocked = true;
            return moved;
        }
        budget -= (size_t)taken < budget ? (size_t)taken : budget;
    }
    peer->blocked = true; /* there may be more */
    return moved;
}

/* ---- reading ------------------------------------------------------------------------------------------------------------ */

uint32_t dss_ahead_bucket(const dss_key_t *key) {
    const dss_key_t whole = {.channel = key->channel, .sequence = key->sequence, .part = key->part};
    return dss_key_bucket(&whole) % DSS_AHEAD_BUCKETS;
}

dss_ahead_t *dss_peer_take_ahead(dss_peer_t *peer, const dss_key_t *key) {
    for (dss_ahead_t **at = &peer->ahead[dss_ahead_bucket(key)]; *at; at = &(*at)->next) {
        dss_ahead_t *ahead = *at;
        if (dss_key_equal(&ahead->key, key)) {
            *at = ahead->next;
            peer->ahead_count--;
            peer->ahead_bytes -= ahead->eager.end;
            return ahead;
        }
    }
    return NULL;
}

static void drop_ahead(dss_peer_t *peer, dss_ahead_t **at) {
    dss_ahead_t *ahead = *at;
    *at = ahead->next;
    peer->gave_up = ahead->signature;
    peer->ahead_count--;
    peer->ahead_bytes -= ahead->eager.end;
    if (peer->keeping == ahead)
        peer->keeping = NULL;
    dss_ahead_destroy(ahead);
}

void dss_peer_drop_ahead(dss_peer_t *peer, uint64_t channel) {
    for (uint32_t i = 0; peer->ahead_count > 0 && i < DSS_AHEAD_BUCKETS; i++)
        for (dss_ahead_t **at = &peer->ahead[i]; *at;)
            if ((*at)->key.channel == channel)
                drop_ahead(peer, at);
            else
                at = &(*at)->next;
}

static dss_ahead_t *find_ahead(const dss_peer_t *peer, const dss_key_t *key) {
    dss_ahead_t *ahead = peer->ahead[dss_ahead_bucket(key)];
    while (ahead && !dss_key_equal(&ahead->key, key))
        ahead = ahead->next;
    return ahead;
}

static dss_member_t *find_member(dss_peer_t *peer, const dss_key_t *key) {
    const dss_operation_t *operation = dss_engine_find(peer->engine, key);
    for (uint32_t i = 0; operation && i < operation->member_count; i++)
        if (operation->members[i].peer == peer)
            return &operation->members[i];
    return NULL;
}

void dss_operation_mismatch(dss_operation_t *operation, dss_peer_t *peer, const dss_signature_t *theirs) {
    const dss_signature_t *own = &operation->signature;
    char mine[128];
    char other[128];
    char cause[480];
    dss_signature_describe(own, mine, sizeof mine);
    dss_signature_describe(theirs, other, sizeof other);
    const char *hint = "";
    if (own->member_count == theirs->member_count && own->members_hash != theirs->members_hash)
        hint = " (the groups are not of the same ranks)";
    else if (strcmp(mine, other) == 0)
        hint = " (sizes, dtypes, order in memory or names of the tensors differ)";
    (void)snprintf(
        cause, sizeof cause,
        "the ranks did not call the same thing: rank %u has %s, rank %u has %s%s. Nothing may be used of it. Every rank must "
        "make the same calls in the same order",
        operation->engine->identity.rank, mine, peer->rank, other, hint);
    dss_operation_fail(operation, DSS_ERR_MISMATCH, "start", cause);
}

void dss_member_open(dss_member_t *member, const dss_signature_t *theirs) {
    const dss_signature_t *own = &member->operation->signature;
    member->opened = true;
    member->peer->latest = member->operation->key;
    if (member->eager)
        member->peer->eager_sent -= (size_t)member->send_goal[DSS_PHASE_REDUCE];
    member->eager = false;
    if (own->kind != theirs->kind || own->dtype != theirs->dtype || own->reduction != theirs->reduction ||
        own->member_count != theirs->member_count || own->element_count != theirs->element_count ||
        own->members_hash != theirs->members_hash || own->layout != theirs->layout) {
        dss_operation_mismatch(member->operation, member->peer, theirs);
        return;
    }
    begin_measuring(member);
    if (member->operation->posted)
        dss_peer_show_board(member->peer);
    dss_peer_queue(member);
    dss_operation_check(member->operation);
}

static void keep_ahead(dss_peer_t *peer, const dss_key_t *key, const dss_signature_t *signature) {
    if (find_ahead(peer, key) || peer->ahead_count >= DSS_MAX_AHEAD) {
        dss_peer_lose(peer, "is out of step: it has posted more than %u operations that this rank has not, or one of them twice",
                      DSS_MAX_AHEAD);
        return;
    }
    dss_ahead_t *ahead = calloc(1, sizeof *ahead);
    if (!ahead) {
        dss_peer_lose(peer, "cannot be listened to: out of memory");
        return;
    }
    dss_ahead_t **bucket = &peer->ahead[dss_ahead_bucket(key)];
    *ahead = (dss_ahead_t){.key = *key, .signature = *signature, .next = *bucket};
    *bucket = ahead;
    peer->ahead_count++;
}

/* An operation without stages where a peer's has some. */
static dss_operation_t *find_plain(dss_engine_t *engine, dss_key_t key) {
    key.stage = 0;
    dss_operation_t *operation = dss_engine_find(engine, &key);
    return operation && operation->algorithm != DSS_HIERARCHY ? operation : NULL;
}

static void opened(dss_peer_t *peer, const uint8_t *payload) {
    dss_error_t error;
    dss_signature_t signature;
    uint8_t copy[DSS_SIGNATURE_BYTES]; /* as in read_header() */
    memcpy(copy, payload, sizeof copy);
    if (dss_signature_decode(copy, &signature, &error) != DSS_OK) {
        dss_peer_lose(peer, "sent nonsense: %s", error.text);
        return;
    }
    const dss_key_t key = peer->frame.key;
    dss_channel_t *failed = dss_channel_failed(peer->engine, key.channel);
    if (failed) {
        dss_channel_tell(failed, peer);
        return;
    }
    dss_member_t *member = find_member(peer, &key);
    if (member && member->opened)
        dss_peer_lose(peer, "sent nonsense: it began an operation twice");
    else if (member)
        dss_member_open(member, &signature);
    else if (dss_engine_find(peer->engine, &key))
        dss_operation_mismatch(dss_engine_find(peer->engine, &key), peer, &signature);
    else if (key.stage && find_plain(peer->engine, key))
        dss_operation_mismatch(find_plain(peer->engine, key), peer, &signature);
    else
        keep_ahead(peer, &key, &signature);
}

static void failed(dss_peer_t *peer, const uint8_t *payload) {
    char text[DSS_MAX_FAIL_TEXT + 1];
    const size_t bytes = peer->frame.payload_bytes < DSS_MAX_FAIL_TEXT ? peer->frame.payload_bytes : DSS_MAX_FAIL_TEXT;
    memcpy(text, payload, bytes);
    text[bytes] = 0;
    for (size_t i = 0; i < bytes; i++)
        if ((unsigned char)text[i] < ' ')
            text[i] = ' '; /* it goes to a terminal */
    dss_channel_fail(peer->engine, peer->frame.key.channel, DSS_ERR_FAILED, text, peer);
}

/* Whose values a data frame holds. False if the peer was lost. */
static bool begin_data(dss_peer_t *peer) {
    const dss_frame_t *frame = &peer->frame;
    peer->reading = find_member(peer, &frame->key);
    peer->keeping = NULL;
    if (peer->reading) {
        const dss_member_t *member = peer->reading;
        const uint64_t left = member->receive_goal[frame->phase] - member->received[frame->phase];
        if (member->opened && frame->offset == member->received[frame->phase] && frame->payload_bytes <= left &&
            frame->payload_bytes % dss_dtype_bytes(member->operation->dtype) == 0)
            return true;
    } else if (dss_channel_failed(peer->engine, frame->key.channel) || peer->engine->stopping || peer->engine->aborted) {
        return true;
    } else {
        dss_ahead_t *ahead = find_ahead(peer, &frame->key);
        if (ahead && frame->phase == DSS_PHASE_REDUCE && frame->offset == ahead->eager.end &&
            frame->payload_bytes % dss_dtype_bytes((dss_dtype_t)ahead->signature.dtype) == 0 &&
            ahead->eager.end + frame->payload_bytes <= DSS_EAGER_BYTES &&
            peer->ahead_bytes + frame->payload_bytes <= DSS_EAGER_TOTAL) {
            peer->keeping = ahead;
            return true;
        }
    }
    dss_peer_lose(peer, "sent nonsense: %u bytes at %llu of an operation that has no place for them", frame->payload_bytes,
                  (unsigned long long)frame->offset);
    return false;
}

static void lose_stream(dss_peer_t *peer, ssize_t error) {
    const char *where = peer->in_frame ? " in the middle of a message" : "";
    if (error == -EPIPE || error == -ECONNRESET)
        dss_peer_lose(peer, "is gone: its process has ended%s (%s)", where, error == -EPIPE ? "end of stream" : "connection reset");
    else
        dss_peer_lose(peer, "is gone%s: %s", where, strerror((int)-error));
}

/* Values that lie on the peer's board. False if the peer was lost. */
static bool read_board(dss_peer_t *peer) {
    if (!peer->board) {
        dss_peer_lose(peer, "sent nonsense: results on a board that this rank does not see");
        return false;
    }
    if (peer->reading)
        (void)dss_operation_take(peer->reading, DSS_PHASE_GATHER, dss_board_slot(peer->board, peer->frame.slot),
                                 peer->frame.payload_bytes);
    dss_board_give(peer->board, peer->frame.slot);
    peer->engine->stats.bytes_received += peer->frame.payload_bytes;
    return true;
}

/* False if nothing more can be done with what is there. */
static bool read_header(dss_peer_t *peer) {
    const uint8_t *bytes = NULL;
    const ssize_t there = peer->stream->ops->peek(peer->stream, DSS_FRAME_BYTES, &bytes);
    if (there < 0) {
        lose_stream(peer, there);
        return false;
    }
    if ((size_t)there < DSS_FRAME_BYTES)
        return false;
    uint8_t header[DSS_FRAME_BYTES]; /* a copy: who shares the memory may change it between the check and the use */
    dss_error_t error;
    memcpy(header, bytes, sizeof header);
    if (dss_frame_decode(header, (uint32_t)peer->engine->identity.epoch, &peer->frame, &error) != DSS_OK) {
        dss_peer_lose(peer, "sent nonsense: %s", error.text);
        return false;
    }
    peer->stream->ops->consume(peer->stream, DSS_FRAME_BYTES);
    peer->engine->stats.bytes_received += DSS_FRAME_BYTES;
    peer->frame_left = peer->frame.type == DSS_FRAME_BOARD ? 0 : peer->frame.payload_bytes;
    peer->frame_padding = padding_of(peer->frame_left);
    peer->in_frame = true;
    peer->asked = false;
    if (peer->frame.type == DSS_FRAME_GOODBYE) {
        dss_peer_lose(peer, "has shut down its process group");
        return false;
    }
    if (peer->frame.type == DSS_FRAME_PING)
        answer(peer);
    if (peer->frame.type == DSS_FRAME_SEEN && !peer->shown) {
        dss_peer_lose(peer, "sent nonsense: it has seen a board that it was not shown");
        return false;
    }
    if (peer->frame.type == DSS_FRAME_SEEN)
        peer->sees = true;
    if (peer->frame.type == DSS_FRAME_FAIL && peer->frame_left > DSS_MAX_FAIL_TEXT) {
        dss_peer_lose(peer, "sent nonsense: a text of %zu bytes", peer->frame_left);
        return false;
    }
    if (peer->frame.type == DSS_FRAME_BOARD)
        return begin_data(peer) && read_board(peer);
    return peer->frame.type != DSS_FRAME_DATA || begin_data(peer);
}

/* How many of the bytes were used, 0 if they cannot be yet. Whole elements only: the rest of one would come alone. */
static size_t take_data(dss_peer_t *peer, const uint8_t *bytes, size_t bytes_count) {
    if (peer->reading)
        return dss_operation_take(peer->reading, peer->frame.phase, bytes,
                                  bytes_count - bytes_count % dss_dtype_bytes(peer->reading->operation->dtype));
    if (!peer->keeping)
        return bytes_count;
    const size_t whole = bytes_count - bytes_count % dss_dtype_bytes((dss_dtype_t)peer->keeping->signature.dtype);
    if (!dss_bytes_append(&peer->keeping->eager, bytes, whole)) {
        dss_peer_lose(peer, "cannot be listened to: out of memory");
        return 0;
    }
    peer->ahead_bytes += whole;
    return whole;
}

/* False if nothing more can be done with what is there. */
static bool read_payload(dss_peer_t *peer) {
    const bool data = peer->frame.type == DSS_FRAME_DATA;
    const size_t wanted = data ? sizeof(uint64_t) : peer->frame_left;
    const uint8_t *bytes = NULL;
    ssize_t there = peer->stream->ops->peek(peer->stream, wanted < peer->frame_left ? wanted : peer->frame_left, &bytes);
    if (there < 0) {
        lose_stream(peer, there);
        return false;
    }
    if (there == 0 || (!data && (size_t)there < peer->frame_left))
        return false;
    size_t used = (size_t)there < peer->frame_left ? (size_t)there : peer->frame_left;
    if (data)
        used = take_data(peer, bytes, used);
    if (peer->state == DSS_PEER_LOST)
        return false;
    if (used == 0) { /* not its turn, or less than an element */
        peer->stalled = peer->reading && (size_t)there >= dss_dtype_bytes(peer->reading->operation->dtype);
        return false;
    }
    if (peer->frame.type == DSS_FRAME_OPEN)
        opened(peer, bytes);
    else if (peer->frame.type == DSS_FRAME_FAIL)
        failed(peer, bytes);
    if (peer->state == DSS_PEER_LOST)
        return false;
    peer->stream->ops->consume(peer->stream, used);
    peer->engine->stats.bytes_received += used;
    peer->frame_left -= used;
    return true;
}

static bool read_padding(dss_peer_t *peer) {
    const uint8_t *bytes = NULL;
    const ssize_t there = peer->stream->ops->peek(peer->stream, 1, &bytes);
    if (there < 0) {
        lose_stream(peer, there);
        return false;
    }
    const size_t used = (size_t)there < peer->frame_padding ? (size_t)there : peer->frame_padding;
    peer->stream->ops->consume(peer->stream, used);
    peer->engine->stats.bytes_received += used;
    peer->frame_padding -= used;
    return used > 0;
}

/* The payload is complete; its padding may be still to come. */
static void end_payload(dss_peer_t *peer) {
    if (peer->reading && is_finished(peer->reading))
        end_measuring(peer->reading);
    if (peer->reading)
        dss_operation_check(peer->reading->operation);
    peer->reading = NULL;
    peer->keeping = NULL;
    peer->in_frame = peer->frame_padding > 0;
}

static bool read_in(dss_peer_t *peer) {
    const uint64_t begin = peer->engine->stats.bytes_received;
    peer->stalled = false;
    while (peer->state == DSS_PEER_READY && peer->engine->stats.bytes_received - begin < DSS_PASS_BYTES) {
        bool moved = false;
        if (!peer->in_frame)
            moved = read_header(peer);
        else if (peer->frame_left > 0)
            moved = read_payload(peer);
        else
            moved = read_padding(peer);
        if (!moved)
            break;
        if (peer->in_frame && peer->frame_left == 0)
            end_payload(peer);
    }
    return peer->engine->stats.bytes_received != begin;
}

bool dss_peer_progress(dss_peer_t *peer) {
    if (peer->state != DSS_PEER_READY)
        return false;
    const bool wrote = write_out(peer);
    const bool read = read_in(peer);
    if (peer->state == DSS_PEER_READY)
        peer->stream->ops->flush(peer->stream);
    return wrote || read;
}

bool dss_peer_unstall(dss_peer_t *peer) {
    const uint8_t *bytes = NULL;
    if (peer->state != DSS_PEER_READY || !peer->stalled || !peer->reading || peer->frame.phase != DSS_PHASE_REDUCE)
        return false;
    const size_t wanted = peer->frame_left < sizeof(uint64_t) ? peer->frame_left : sizeof(uint64_t);
    const ssize_t there = peer->stream->ops->peek(peer->stream, wanted, &bytes);
    if (there <= 0)
        return false;
    size_t bytes_count = (size_t)there < peer->frame_left ? (size_t)there : peer->frame_left;
    bytes_count -= bytes_count % dss_dtype_bytes(peer->reading->operation->dtype);
    if (bytes_count == 0)
        return false;
    if (!dss_operation_stage(peer->reading, bytes, bytes_count)) {
        dss_peer_lose(peer, "cannot be listened to: out of memory");
        return true;
    }
    peer->stream->ops->consume(peer->stream, bytes_count);
    peer->engine->stats.bytes_received += bytes_count;
    peer->frame_left -= bytes_count;
    peer->stalled = false;
    if (peer->frame_left == 0)
        end_payload(peer);
    peer->stream->ops->flush(peer->stream);
    return true;
}
