/*
 * stream_socket.h: a stream over a connected stream socket, TCP or Unix, or over two, and what the engine must know about such
 * sockets.
 *
 * One system call a write gathers what is posted, one a read fills a buffer of the stream's own, so that small frames cost a
 * fraction of a call each; the price is one copy of what is received. A Unix socket can also hand over one descriptor, which is
 * how shared memory reaches a peer (stream_shared.h). No locks: the caller holds the engine's.
 */
#ifndef DSS_STREAM_SOCKET_H
#define DSS_STREAM_SOCKET_H

#include "status.h"
#include "stream.h"

/* `fd`: a connected, or still connecting, non-blocking stream socket, the stream's from now on. `name` (static) is for people:
 * "tcp", "unix". NULL if there is no memory; fd is then still the caller's. */
dss_stream_t *dss_stream_socket_create(int fd, const char *name, dss_error_t *error_p);

/* One stream of two, none of which was written to or read from since its handshake: what comes is read from `in`, what is sent
 * goes to `out`, whose own reading ends. Both are the new stream's, which is at `in`'s address. Its end is the end of `in`: if
 * `out` breaks, the peer finds an end there, at the next keepalive at the latest, and closes both. */
dss_stream_t *dss_stream_socket_join(dss_stream_t *in, dss_stream_t *out);

/* Sends a few bytes (fewer than a page) with a descriptor, which stays the caller's. DSS_ERR_PEER_LOST if the stream is broken,
 * DSS_ERR_SYSTEM if the system refuses, or has no room: meant for a stream with nothing else under way. */
dss_status_t dss_stream_socket_send_fd(dss_stream_t *stream, int fd, const void *bytes, size_t bytes_count);
/* The descriptor that came with bytes peeked so far, now the caller's; -1 if there is none. A second one that comes before the
 * first is taken is closed. */
int dss_stream_socket_take_fd(dss_stream_t *stream);

/* No delay for small frames; a peer whose host is gone is an error after about 12 s of an idle connection. DSS_ERR_SYSTEM if
 * refused. */
dss_status_t dss_socket_tune_tcp(int fd);
/* Whether the peer's host has acknowledged nothing for so long although data or probes wait for it. A process that merely reads
 * nothing is not silent, its host answers: TCP_USER_TIMEOUT would end that connection too. Needs dss_socket_tune_tcp(). */
bool dss_socket_is_silent(int fd, uint64_t milliseconds);

#endif
