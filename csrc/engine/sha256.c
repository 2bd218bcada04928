#include "sha256.h"

#include <string.h>

#define LENGTH_AT (DSS_SHA256_BLOCK_BYTES - 8) /* of the last block: the message's length in bits, big-endian */

/* The first 32 bits of the fractions of the cube roots of the first 64 primes. */
static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* The same of the square roots of the first 8. */
static const uint32_t first_state[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

static uint32_t rotate_right(uint32_t word, unsigned count) {
    return word >> count | word << (32 - count);
}

static uint32_t get_big_endian(const uint8_t *bytes) {
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
}

static void put_big_endian(uint8_t *bytes, uint32_t word) {
    for (unsigned i = 0; i < 4; i++)
        bytes[i] = (uint8_t)(word >> (24 - 8 * i));
}

static void make_schedule(const uint8_t *block, uint32_t words[64]) {
    for (size_t i = 0; i < 16; i++)
        words[i] = get_big_endian(block + 4 * i);
    for (size_t i = 16; i < 64; i++) {
        const uint32_t early = words[i - 15];
        const uint32_t late = words[i - 2];
        const uint32_t sigma0 = rotate_right(early, 7) ^ rotate_right(early, 18) ^ early >> 3;
        const uint32_t sigma1 = rotate_right(late, 17) ^ rotate_right(late, 19) ^ late >> 10;
        words[i] = words[i - 16] + sigma0 + words[i - 7] + sigma1;
    }
}

/* FIPS 180-4, 6.2.2: v[0] to v[7] are its a to h. */
static void take_block(uint32_t state[8], const uint8_t *block) {
    uint32_t words[64];
    uint32_t v[8];
    make_schedule(block, words);
    memcpy(v, state, sizeof v);
    for (size_t i = 0; i < 64; i++) {
        const uint32_t sum1 = rotate_right(v[4], 6) ^ rotate_right(v[4], 11) ^ rotate_right(v[4], 25);
        const uint32_t choice = (v[4] & v[5]) ^ (~v[4] & v[6]);
        const uint32_t t1 = v[7] + sum1 + choice + round_constants[i] + words[i];
        const uint32_t sum0 = rotate_right(v[0], 2) ^ rotate_right(v[0], 13) ^ rotate_right(v[0], 22);
        const uint32_t majority = (v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]);
        memmove(v + 1, v, 7 * sizeof v[0]);
        v[4] += t1;
        v[0] = t1 + sum0 + majority;
    }
    for (size_t i = 0; i < 8; i++)
        state[i] += v[i];
    dss_wipe(words, sizeof words);
    dss_wipe(v, sizeof v);
}

void dss_sha256_begin(dss_sha256_t *sha) {
    memcpy(sha->state, first_state, sizeof first_state);
    sha->fed_bytes = 0;
}

void dss_sha256_more(dss_sha256_t *sha, const void *bytes, size_t bytes_count) {
    const uint8_t *next = bytes;
    while (bytes_count) {
        const size_t held = (size_t)(sha->fed_bytes % DSS_SHA256_BLOCK_BYTES);
        const size_t room = DSS_SHA256_BLOCK_BYTES - held;
        const size_t count = bytes_count < room ? bytes_count : room;
        memcpy(sha->block + held, next, count);
        if (count == room)
            take_block(sha->state, sha->block);
        sha->fed_bytes += count;
        next += count;
        bytes_count -= count;
    }
}

void dss_sha256_end(dss_sha256_t *sha, uint8_t digest[DSS_SHA256_BYTES]) {
    static const uint8_t padding[DSS_SHA256_BLOCK_BYTES] = {0x80};
    const uint64_t bit_count = sha->fed_bytes * 8;
    const size_t held = (size_t)(sha->fed_bytes % DSS_SHA256_BLOCK_BYTES);
    uint8_t length[8];
    dss_sha256_more(sha, padding, held < LENGTH_AT ? LENGTH_AT - held : DSS_SHA256_BLOCK_BYTES + LENGTH_AT - held);
    put_big_endian(length, (uint32_t)(bit_count >> 32));
    put_big_endian(length + 4, (uint32_t)bit_count);
    dss_sha256_more(sha, length, sizeof length);
    for (size_t i = 0; i < 8; i++)
        put_big_endian(digest + 4 * i, sha->state[i]);
    dss_wipe(sha, sizeof *sha);
}

static void begin_padded(dss_sha256_t *sha, const uint8_t key[DSS_SHA256_BLOCK_BYTES], uint8_t pad) {
    uint8_t padded[DSS_SHA256_BLOCK_BYTES];
    for (size_t i = 0; i < sizeof padded; i++)
        padded[i] = key[i] ^ pad;
    dss_sha256_begin(sha);
    dss_sha256_more(sha, padded, sizeof padded);
    dss_wipe(padded, sizeof padded);
}

void dss_hmac_begin(dss_hmac_t *hmac, const void *key, size_t key_bytes) {
    uint8_t block[DSS_SHA256_BLOCK_BYTES] = {0};
    if (key_bytes > sizeof block) {
        dss_sha256_begin(&hmac->inner);
        dss_sha256_more(&hmac->inner, key, key_bytes);
        dss_sha256_end(&hmac->inner, block);
    } else if (key_bytes) {
        memcpy(block, key, key_bytes);
    }
    begin_padded(&hmac->inner, block, 0x36);
    begin_padded(&hmac->outer, block, 0x5c);
    dss_wipe(block, sizeof block);
}

void dss_hmac_more(dss_hmac_t *hmac, const void *bytes, size_t bytes_count) {
    dss_sha256_more(&hmac->inner, bytes, bytes_count);
}

void dss_hmac_end(dss_hmac_t *hmac, uint8_t mac[DSS_SHA256_BYTES]) {
    dss_sha256_end(&hmac->inner, mac);
    dss_sha256_more(&hmac->outer, mac, DSS_SHA256_BYTES);
    dss_sha256_end(&hmac->outer, mac);
}

bool dss_mac_equal(const uint8_t *left, const uint8_t *right, size_t bytes_count) {
    uint8_t difference = 0;
    for (size_t i = 0; i < bytes_count; i++)
        difference |= left[i] ^ right[i];
    return difference == 0;
}

void dss_wipe(void *bytes, size_t bytes_count) {
    volatile uint8_t *next = bytes;
    while (bytes_count--)
        *next++ = 0;
}
