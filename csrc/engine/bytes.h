/*
 * bytes.h: little-endian integers at fixed offsets of a message.
 *
 * Byte by byte, so that neither alignment nor the machine's byte order matters; compilers make one load or store of each.
 */
#ifndef DSS_BYTES_H
#define DSS_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline void dss_put_u16(uint8_t *bytes, uint16_t value) {
    bytes[0] = (uint8_t)value;
    bytes[1] = (uint8_t)(value >> 8);
}

static inline void dss_put_u32(uint8_t *bytes, uint32_t value) {
    dss_put_u16(bytes, (uint16_t)value);
    dss_put_u16(bytes + 2, (uint16_t)(value >> 16));
}

static inline void dss_put_u64(uint8_t *bytes, uint64_t value) {
    dss_put_u32(bytes, (uint32_t)value);
    dss_put_u32(bytes + 4, (uint32_t)(value >> 32));
}

static inline uint16_t dss_get_u16(const uint8_t *bytes) {
    return (uint16_t)(bytes[0] | (unsigned)bytes[1] << 8);
}

static inline uint32_t dss_get_u32(const uint8_t *bytes) {
    return dss_get_u16(bytes) | (uint32_t)dss_get_u16(bytes + 2) << 16;
}

static inline uint64_t dss_get_u64(const uint8_t *bytes) {
    return dss_get_u32(bytes) | (uint64_t)dss_get_u32(bytes + 4) << 32;
}

/* Whether all bytes of [begin, end) are 0, as reserved ones must be. */
static inline bool dss_bytes_zero(const uint8_t *bytes, size_t begin, size_t end) {
    uint8_t any = 0;
    for (size_t i = begin; i < end; i++)
        any |= bytes[i];
    return any == 0;
}

#endif
