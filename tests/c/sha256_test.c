#include "check.h"

#include "sha256.h"

#define LONGEST 200u

static void check_hex(const uint8_t digest[DSS_SHA256_BYTES], const char *expected, const char *of) {
    char hex[2 * DSS_SHA256_BYTES + 1];
    for (unsigned i = 0; i < DSS_SHA256_BYTES; i++)
        snprintf(hex + (size_t)2 * i, 3, "%02x", digest[i]);
    CHECK_FOR(strcmp(hex, expected) == 0, "%s: %s", of, hex);
}

static void hash(const void *bytes, size_t bytes_count, uint8_t digest[DSS_SHA256_BYTES]) {
    dss_sha256_t sha;
    dss_sha256_begin(&sha);
    dss_sha256_more(&sha, bytes, bytes_count);
    dss_sha256_end(&sha, digest);
}

static void the_digests_are_those_of_fips_180_4(void) {
    static const char two_blocks[] = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    char *million = malloc(1000000);
    uint8_t digest[DSS_SHA256_BYTES];
    hash("", 0, digest);
    check_hex(digest, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "nothing");
    hash("abc", 3, digest);
    check_hex(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "abc");
    hash(two_blocks, sizeof two_blocks - 1, digest);
    check_hex(digest, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1", "two blocks");
    memset(million, 'a', 1000000);
    hash(million, 1000000, digest);
    check_hex(digest, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0", "a million a");
    free(million);
}

/* The digest of the digests of every length from 0 to 200, as another implementation makes it: each length pads differently. */
static void every_length_pads_as_it_should(void) {
    uint8_t bytes[LONGEST];
    uint8_t digest[DSS_SHA256_BYTES];
    dss_sha256_t all;
    for (unsigned i = 0; i < LONGEST; i++)
        bytes[i] = (uint8_t)(i * 7 + 3);
    dss_sha256_begin(&all);
    for (size_t count = 0; count <= LONGEST; count++) {
        hash(bytes, count, digest);
        dss_sha256_more(&all, digest, sizeof digest);
    }
    dss_sha256_end(&all, digest);
    check_hex(digest, "3275febb4612d86d586eb9f11cd21e648a9fc7d95e0f6b8d362786e28c9c5b79", "all lengths");
}

static void the_pieces_do_not_matter(void) {
    uint64_t chance = 7;
    uint8_t bytes[LONGEST];
    uint8_t whole[DSS_SHA256_BYTES];
    uint8_t pieces[DSS_SHA256_BYTES];
    for (unsigned i = 0; i < LONGEST; i++)
        bytes[i] = (uint8_t)check_random(&chance);
    hash(bytes, sizeof bytes, whole);
    for (unsigned round = 0; round < 500; round++) {
        dss_sha256_t sha;
        dss_sha256_begin(&sha);
        for (size_t fed = 0; fed < sizeof bytes;) {
            const size_t left = sizeof bytes - fed;
            const size_t wanted = check_random_below(&chance, 90); /* 0 too */
            const size_t count = wanted < left ? wanted : left;
            dss_sha256_more(&sha, bytes + fed, count);
            fed += count;
        }
        dss_sha256_end(&sha, pieces);
        CHECK_FOR(memcmp(whole, pieces, sizeof whole) == 0, "round %u", round);
    }
}

static void check_mac(const char *name, const void *key, size_t key_bytes, const void *data, size_t data_bytes,
                      const char *expected) {
    uint8_t mac[DSS_SHA256_BYTES];
    for (size_t split = 0; split <= data_bytes; split++) {
        dss_hmac_t hmac;
        dss_hmac_begin(&hmac, key, key_bytes);
        dss_hmac_more(&hmac, data, split);
        dss_hmac_more(&hmac, (const uint8_t *)data + split, data_bytes - split);
        dss_hmac_end(&hmac, mac);
        check_hex(mac, expected, name);
    }
}

static void the_macs_are_those_of_rfc_4231(void) {
    static const char question[] = "what do ya want for nothing?";
    static const char large_key[] = "Test Using Larger Than Block-Size Key - Hash Key First";
    static const char large_both[] = "This is a test using a larger than block-size key and a larger than block-size data. "
                                     "The key needs to be hashed before being used by the HMAC algorithm.";
    uint8_t key[131];
    uint8_t data[50];
    memset(key, 0x0b, sizeof key);
    check_mac("case 1", key, 20, "Hi There", 8, "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
    check_mac("case 2", "Jefe", 4, question, sizeof question - 1,
              "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    memset(key, 0xaa, sizeof key);
    memset(data, 0xdd, sizeof data);
    check_mac("case 3", key, 20, data, sizeof data, "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe");
    check_mac("case 6", key, sizeof key, large_key, sizeof large_key - 1,
              "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
    check_mac("case 7", key, sizeof key, large_both, sizeof large_both - 1,
              "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2");
    for (unsigned i = 0; i < 25; i++)
        key[i] = (uint8_t)(i + 1);
    memset(data, 0xcd, sizeof data);
    check_mac("case 4", key, 25, data, sizeof data, "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b");
}

static void macs_are_equal_only_in_every_byte(void) {
    uint8_t left[DSS_SHA256_BYTES];
    uint8_t right[DSS_SHA256_BYTES];
    memset(left, 0x5a, sizeof left);
    memcpy(right, left, sizeof right);
    CHECK(dss_mac_equal(left, right, sizeof left));
    for (unsigned bit = 0; bit < 8 * sizeof left; bit++) {
        right[bit / 8] ^= (uint8_t)(1u << bit % 8);
        CHECK_FOR(!dss_mac_equal(left, right, sizeof left), "bit %u", bit);
        CHECK_FOR(dss_mac_equal(left, right, bit / 8), "the bytes before bit %u", bit);
        right[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
}

static void nothing_of_the_key_stays_in_a_state(void) {
    static const dss_hmac_t nothing;
    uint8_t mac[DSS_SHA256_BYTES];
    dss_hmac_t hmac;
    memset(&hmac, 0xff, sizeof hmac);
    dss_hmac_begin(&hmac, "key", 3);
    dss_hmac_end(&hmac, mac);
    CHECK(memcmp(&hmac, &nothing, sizeof hmac) == 0);
}

int main(void) {
    RUN(the_digests_are_those_of_fips_180_4);
    RUN(every_length_pads_as_it_should);
    RUN(the_pieces_do_not_matter);
    RUN(the_macs_are_those_of_rfc_4231);
    RUN(macs_are_equal_only_in_every_byte);
    RUN(nothing_of_the_key_stays_in_a_state);
}
