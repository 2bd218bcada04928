#include "hash.h"

uint64_t dss_hash_more(uint64_t state, const void *bytes, size_t bytes_bytes) {
    const unsigned char *next = bytes;
    for (size_t i = 0; i < bytes_bytes; i++)
        state = (state ^ next[i]) * 1099511628211u;
    return state;
}

uint64_t dss_hash(const void *bytes, size_t bytes_bytes, uint64_t basis) {
    return dss_hash_more(basis ? basis : DSS_HASH_BEGIN, bytes, bytes_bytes);
}
