/*
 * address.h: where a rank listens, and the card that tells the others.
 *
 * Every rank listens on one TCP port, bound to one address of one interface and nothing wider, and on an abstract Unix socket with
 * a random name, which only processes of the same host (and network namespace) can reach: reaching it is the proof of being on one
 * host, host names prove nothing. A card of fixed size carries both through the bootstrap, with rank 0's secret and epoch.
 */
#ifndef DSS_ADDRESS_H
#define DSS_ADDRESS_H

#include <sys/socket.h>

#include "handshake.h"

#define DSS_UNIX_NAME_BYTES 16u
#define DSS_CARD_BYTES 128u
#define DSS_ADDRESS_TEXT_BYTES 64u

typedef struct dss_address {
    uint8_t family;    /* 4, 6, or 0: none */
    uint8_t bytes[16]; /* network order; IPv4 in the first four */
    uint16_t port;     /* host order */
} dss_address_t;

typedef struct dss_card {
    dss_address_t address;
    bool has_unix;
    uint8_t unix_name[DSS_UNIX_NAME_BYTES];
    uint64_t epoch;                   /* rank 0's count, the others' are ignored */
    uint8_t secret[DSS_SECRET_BYTES]; /* likewise; all zero from the others */
} dss_card_t;

/* The address to listen on, port 0. `interfaces`: names divided by commas, the first that exists and has a usable address is taken
 * (IPv4 before IPv6, link-local IPv6 never); NULL or "": the address from which `reach` (a host name or a number, usually the
 * store's host; NULL: this host's loopback) would be called, without sending anything. DSS_ERR_INVALID_ARGUMENT names what was
 * asked for and, for interfaces, those that there are. */
dss_status_t dss_address_choose(const char *interfaces, const char *reach, dss_address_t *address_p, dss_error_t *error_p);

/* The bytes of a struct sockaddr for connect() and bind(); its length. */
socklen_t dss_address_to_socket(const dss_address_t *address, struct sockaddr_storage *storage);
void dss_address_from_socket(const struct sockaddr_storage *storage, dss_address_t *address_p);
/* "10.0.0.1:3456", "[2001:db8::1]:3456", for errors. Returns text. */
const char *dss_address_text(const dss_address_t *address, char text[DSS_ADDRESS_TEXT_BYTES]);
bool dss_address_is_loopback(const dss_address_t *address);
/* The abstract Unix address of a name; its length. */
socklen_t dss_unix_to_socket(const uint8_t name[DSS_UNIX_NAME_BYTES], struct sockaddr_storage *storage);

/* Layout: 0 magic "dssC" | 4 u8 version 1 | 5 u8 family | 6 u16 port | 8 address[16] | 24 u8 has_unix | 25..31 0 | 32 unix_name[16]
 * | 48 u64 epoch | 56 secret[32] | 88..127 0. */
void dss_card_encode(const dss_card_t *card, uint8_t bytes[DSS_CARD_BYTES]);
dss_status_t dss_card_decode(const uint8_t bytes[DSS_CARD_BYTES], dss_card_t *card_p, dss_error_t *error_p); /* DSS_ERR_CORRUPT */

/* Random bytes from the kernel. DSS_ERR_SYSTEM if it gives none. */
dss_status_t dss_random_bytes(void *bytes, size_t bytes_count, dss_error_t *error_p);

#endif
