#define _GNU_SOURCE /* struct tcp_info, MSG_CMSG_CLOEXEC */

#include "stream_socket.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "address.h"
#include "descriptors.h"

#define BUFFER_BYTES ((size_t)256 << 10)
#define MAX_LIST_COUNT 1024 /* the kernel's limit */
#define MAX_DRAINS 4096     /* a peer that never stops sending must not hold up a close */

typedef struct socket_stream {
    dss_stream_t base;
    dss_stream_ops_t ops; /* a copy, for the name */
    uint8_t *buffer;      /* owned; NULL until the first peek */
    size_t begin;         /* what came and is not consumed: buffer[begin .. end) */
    size_t end;
    bool told;       /* a peek gave all that the buffer holds, and nothing was consumed since */
    int read_error;  /* -errno: nothing more will come; -EPIPE: the peer has closed */
    int write_error; /* -errno */
    int passed_fd;   /* owned; -1: none */
} socket_stream_t;

static socket_stream_t *socket_of(dss_stream_t *stream) {
    return (socket_stream_t *)stream;
}

static bool is_joined(const socket_stream_t *stream) {
    return stream->base.out_fd != stream->base.fd;
}

static bool is_not_now(int error) {
    return error == EAGAIN || error == EWOULDBLOCK || error == EINTR;
}

static ssize_t socket_send(socket_stream_t *stream, const struct msghdr *message) {
    if (stream->write_error)
        return stream->write_error;
    const ssize_t sent = sendmsg(stream->base.out_fd, message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0)
        return sent;
    if (is_not_now(errno))
        return 0;
    stream->write_error = -errno;
    if (is_joined(stream)) /* whatever it was, the peer sees the end, and closes what we read from */
        (void)shutdown(stream->base.out_fd, SHUT_RDWR);
    return stream->write_error;
}

static ssize_t socket_write(dss_stream_t *base, const struct iovec *list, int list_count) {
    struct msghdr message = {0};
    message.msg_iov = (struct iovec *)list; /* sendmsg() does not write to it */
    message.msg_iovlen = (size_t)(list_count < MAX_LIST_COUNT ? list_count : MAX_LIST_COUNT);
    return socket_send(socket_of(base), &message);
}

/* Padding leaves room for more descriptors than were asked for, so there can be several even in a small control message. Those the
 * kernel had no room for (MSG_CTRUNC) it has closed itself. */
static void socket_keep_passed(socket_stream_t *stream, struct msghdr *message) {
    for (struct cmsghdr *control = CMSG_FIRSTHDR(message); control; control = CMSG_NXTHDR(message, control)) {
        if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS)
            continue;
        const size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(control) + i * sizeof fd, sizeof fd);
            if (stream->passed_fd < 0)
                stream->passed_fd = fd;
            else
                (void)close(fd);
        }
    }
}

/* Fills the buffer behind `end`: how many bytes, 0 if there are none now, -errno. */
static ssize_t socket_receive(socket_stream_t *stream) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec piece = {stream->buffer + stream->end, BUFFER_BYTES - stream->end};
    struct msghdr message = {0};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = &control;
    message.msg_controllen = sizeof control;
    const ssize_t got = recvmsg(stream->base.fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0 && !is_not_now(errno))
        return -errno;
    if (got > 0)
        socket_keep_passed(stream, &message);
    if (got > 0 || (got < 0 && (!stream->write_error || is_joined(stream))))
        return got > 0 ? got : 0;
    /* A reset that a write was told of is not told again: it would look like an orderly end here. */
    return stream->write_error ? stream->write_error : -EPIPE;
}

/* Makes room for `wanted` bytes in all. */
static int socket_make_room(socket_stream_t *stream, size_t wanted) {
    if (!stream->buffer && !(stream->buffer = malloc(BUFFER_BYTES)))
        return -ENOMEM;
    const size_t held = stream->end - stream->begin;
    if (held && stream->begin + wanted <= BUFFER_BYTES)
        return 0;
    memmove(stream->buffer, stream->buffer + stream->begin, held);
    stream->begin = 0;
    stream->end = held;
    return 0;
}

static ssize_t socket_peek(dss_stream_t *base, size_t wanted, const uint8_t **bytes_p) {
    socket_stream_t *stream = socket_of(base);
    wanted = wanted ? wanted : 1;
    while (stream->end - stream->begin < wanted && !stream->read_error) {
        stream->read_error = socket_make_room(stream, wanted);
        const ssize_t got = stream->read_error ? 0 : socket_receive(stream);
        if (got < 0)
            stream->read_error = (int)got;
        if (got <= 0)
            break;
        stream->end += (size_t)got;
        stream->told = false;
    }
    const size_t held = stream->end - stream->begin;
    if (!held || (held < wanted && stream->read_error && stream->told))
        return stream->read_error;
    stream->told = true;
    *bytes_p = stream->buffer + stream->begin;
    return (ssize_t)held;
}

static void socket_consume(dss_stream_t *base, size_t bytes_count) {
    socket_stream_t *stream = socket_of(base);
    stream->begin += bytes_count;
    stream->told = false;
}

static void socket_flush(dss_stream_t *base) {
    (void)base; /* writes have rung */
}

static uint32_t socket_arm(dss_stream_t *base, bool want_room) {
    const socket_stream_t *stream = socket_of(base);
    const bool broken = stream->write_error && !is_joined(stream);
    if (stream->read_error || broken || (stream->end > stream->begin && !stream->told))
        return 0;
    return EPOLLIN | (want_room && !stream->write_error ? EPOLLOUT : 0u);
}

static void socket_woken(dss_stream_t *base, uint32_t events) {
    (void)base;
    (void)events; /* the next peek or write finds out what it was */
}

static bool socket_peer_waits(dss_stream_t *base) {
    (void)base;
    return true;
}

/* A close with unread bytes resets a TCP connection and throws away what is still to be sent: so they are read first. */
static void close_drained(int fd) {
    char unread[16384];
    (void)shutdown(fd, SHUT_WR);
    for (int i = 0; i < MAX_DRAINS && recv(fd, unread, sizeof unread, MSG_DONTWAIT) > 0; i++)
        continue;
    dss_descriptor_close(fd);
}

static void socket_close(dss_stream_t *base) {
    socket_stream_t *stream = socket_of(base);
    if (is_joined(stream))
        close_drained(base->out_fd);
    close_drained(base->fd);
    if (stream->passed_fd >= 0)
        (void)close(stream->passed_fd);
    free(stream->buffer);
    free(stream);
}

dss_stream_t *dss_stream_socket_create(int fd, const char *name, dss_error_t *error_p) {
    socket_stream_t *stream = calloc(1, sizeof *stream);
    if (!stream) {
        (void)dss_fail(error_p, DSS_ERR_NO_MEMORY, "no memory for a stream");
        return NULL;
    }
    stream->ops = (dss_stream_ops_t){name,       socket_write, socket_peek,       socket_consume, socket_flush,
                                     socket_arm, socket_woken, socket_peer_waits, socket_close};
    stream->base.ops = &stream->ops;
    stream->base.fd = fd;
    stream->base.out_fd = fd;
    stream->passed_fd = -1;
    return &stream->base;
}

dss_stream_t *dss_stream_socket_join(dss_stream_t *in, dss_stream_t *out) {
    socket_stream_t *rest = socket_of(out);
    in->out_fd = out->fd;
    socket_of(in)->write_error = rest->write_error;
    free(rest->buffer);
    free(rest);
    return in;
}

dss_status_t dss_stream_socket_send_fd(dss_stream_t *stream, int fd, const void *bytes, size_t bytes_count) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec piece = {(void *)bytes, bytes_count};
    struct msghdr message = {0};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = &control;
    message.msg_controllen = sizeof control;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    const ssize_t sent = socket_send(socket_of(stream), &message);
    if (sent == -EPIPE || sent == -ECONNRESET)
        return DSS_ERR_PEER_LOST;
    return sent == (ssize_t)bytes_count ? DSS_OK : DSS_ERR_SYSTEM;
}

int dss_stream_socket_take_fd(dss_stream_t *stream) {
    socket_stream_t *self = socket_of(stream);
    const int fd = self->passed_fd;
    self->passed_fd = -1;
    return fd;
}

dss_status_t dss_socket_tune_tcp(int fd) {
    static const struct {
        int level;
        int option;
        int value;
    } settings[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},   {SOL_SOCKET, SO_KEEPALIVE, 1}, {IPPROTO_TCP, TCP_KEEPIDLE, 2},
        {IPPROTO_TCP, TCP_KEEPINTVL, 2}, {IPPROTO_TCP, TCP_KEEPCNT, 5},
    };
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        if (setsockopt(fd, settings[i].level, settings[i].option, &settings[i].value, sizeof settings[i].value))
            return DSS_ERR_SYSTEM;
    }
    struct sockaddr_storage storage;
    socklen_t length = sizeof storage;
    dss_address_t own;
    if (getsockname(fd, (struct sockaddr *)&storage, &length) == 0) {
        dss_address_from_socket(&storage, &own);
        if (dss_address_is_loopback(&own)) /* nothing to be fair to; where that is the default, bbr costs a third of the speed */
            (void)setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", sizeof "reno" - 1);
    }
    return DSS_OK;
}

/* The last acknowledgement may be old merely because nothing was sent since, and what was sent now is not answered yet: hence at
 * least two retransmissions or probes without an answer. Those of the kernel's counters start again at each answer. */
bool dss_socket_is_silent(int fd, uint64_t milliseconds) {
    struct tcp_info info = {0};
    socklen_t info_bytes = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &info_bytes) || info.tcpi_state == TCP_SYN_SENT)
        return false;
    const bool waits = (info.tcpi_unacked > 0 && info.tcpi_retransmits >= 2) || info.tcpi_probes >= 2;
    return waits && info.tcpi_last_ack_recv >= milliseconds;
}
