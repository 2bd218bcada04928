/*
 * sha256.h: SHA-256 (FIPS 180-4) and HMAC-SHA-256 (RFC 2104), fed in pieces of any size.
 *
 * Here, so that the engine needs no cryptographic library for four short messages a connection. Written to be checked by reading,
 * not for speed (some hundred MB/s), and without any branch or index that depends on a secret. No locks: a state belongs to its
 * caller. The `_end` functions wipe the state, which held the key.
 */
#ifndef DSS_SHA256_H
#define DSS_SHA256_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DSS_SHA256_BYTES 32u
#define DSS_SHA256_BLOCK_BYTES 64u

typedef struct dss_sha256 {
    uint32_t state[8];
    uint64_t fed_bytes;
    uint8_t block[DSS_SHA256_BLOCK_BYTES]; /* its first fed_bytes % 64 bytes wait for the rest of the block */
} dss_sha256_t;

void dss_sha256_begin(dss_sha256_t *sha);
void dss_sha256_more(dss_sha256_t *sha, const void *bytes, size_t bytes_count);
void dss_sha256_end(dss_sha256_t *sha, uint8_t digest[DSS_SHA256_BYTES]);

typedef struct dss_hmac {
    dss_sha256_t inner;
    dss_sha256_t outer;
} dss_hmac_t;

void dss_hmac_begin(dss_hmac_t *hmac, const void *key, size_t key_bytes);
void dss_hmac_more(dss_hmac_t *hmac, const void *bytes, size_t bytes_count);
void dss_hmac_end(dss_hmac_t *hmac, uint8_t mac[DSS_SHA256_BYTES]);

/* Whether two MACs are the same; how long it takes does not tell where they differ. */
bool dss_mac_equal(const uint8_t *left, const uint8_t *right, size_t bytes_count);

/* Zeroes what is not read again; a plain memset there may be left out by the compiler. */
void dss_wipe(void *bytes, size_t bytes_count);

#endif
