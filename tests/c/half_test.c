#include "check.h"

#include "half.h"
#include "half_reference.h"

typedef struct version {
    const dss_half_t *half;
    const char *name;
    half_format_t format;
} version_t;

static version_t versions[4];
static unsigned version_count;

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static int is_nan_half(half_format_t format, uint16_t half) {
    return (half & 0x7fff) > ((1 << format.exponent_bits) - 1) << format.mantissa_bits;
}

/* The whole block from an odd address, as it comes out of a flat bucket cut anywhere. */
static void widen_block(const version_t *version, const uint16_t *halves, float *values) {
    unsigned char odd[1 + 2 * DSS_BLOCK];
    memcpy(odd + 1, halves, 2 * DSS_BLOCK);
    version->half->widen(odd + 1, (unsigned char *)values, DSS_BLOCK);
}

static void narrow_block(const version_t *version, const float *values, uint16_t *halves) {
    unsigned char odd[1 + 2 * DSS_BLOCK + 1];
    odd[0] = odd[2 * DSS_BLOCK + 1] = 0x5a;
    version->half->narrow((const unsigned char *)values, odd + 1, DSS_BLOCK);
    CHECK_FOR(odd[0] == 0x5a && odd[2 * DSS_BLOCK + 1] == 0x5a, "%s wrote beyond its block", version->name);
    memcpy(halves, odd + 1, 2 * DSS_BLOCK);
}

static void every_value_widens_exactly(void) {
    for (unsigned v = 0; v < version_count; v++) {
        for (uint32_t first = 0; first < 65536; first += DSS_BLOCK) {
            uint16_t halves[DSS_BLOCK];
            float values[DSS_BLOCK];
            for (uint32_t i = 0; i < DSS_BLOCK; i++)
                halves[i] = (uint16_t)(first + i);
            widen_block(&versions[v], halves, values);
            for (uint32_t i = 0; i < DSS_BLOCK; i++) {
                const double expected = reference_widen(versions[v].format, halves[i]);
                CHECK_FOR(isnan(expected) ? isnan(values[i]) : values[i] == expected && !signbit(values[i]) == !signbit(expected),
                          "%s: %#x became %g, expected %g", versions[v].name, halves[i], (double)values[i], expected);
            }
        }
    }
}

static void check_narrow(const version_t *version, const float *values) {
    uint16_t halves[DSS_BLOCK];
    narrow_block(version, values, halves);
    for (uint32_t i = 0; i < DSS_BLOCK; i++) {
        if (isnan(values[i])) {
            CHECK_FOR(is_nan_half(version->format, halves[i]), "%s: NaN %#x became %#x", version->name, bits_of(values[i]),
                      halves[i]);
            continue;
        }
        const uint16_t expected = reference_narrow(version->format, values[i]);
        CHECK_FOR(halves[i] == expected, "%s: %.9g (%#x) became %#x, expected %#x", version->name, (double)values[i],
                  bits_of(values[i]), halves[i], expected);
    }
}

static void every_value_survives_the_round_trip(void) {
    for (unsigned v = 0; v < version_count; v++) {
        for (uint32_t first = 0; first < 65536; first += DSS_BLOCK) {
            uint16_t halves[DSS_BLOCK];
            uint16_t again[DSS_BLOCK];
            float values[DSS_BLOCK];
            for (uint32_t i = 0; i < DSS_BLOCK; i++)
                halves[i] = (uint16_t)(first + i);
            widen_block(&versions[v], halves, values);
            narrow_block(&versions[v], values, again);
            for (uint32_t i = 0; i < DSS_BLOCK; i++)
                CHECK_FOR(is_nan_half(versions[v].format, halves[i]) ? is_nan_half(versions[v].format, again[i])
                                                                     : halves[i] == again[i],
                          "%s: %#x became %#x", versions[v].name, halves[i], again[i]);
        }
    }
}

/* Each half, the midpoint to the next one, and the floats right beside both: where rounding goes wrong, it goes wrong here. The
 * step past the largest half is the border of infinity. */
static void midpoints_round_to_even(void) {
    for (unsigned v = 0; v < version_count; v++) {
        const half_format_t format = versions[v].format;
        const int dropped_bits = format.exponent_bits == 8 ? 16 : 13;
        float values[DSS_BLOCK] = {0};
        unsigned count = 0;
        for (uint32_t half = 0; half < 65536; half++) {
            if (is_nan_half(format, (uint16_t)half) || isinf(reference_widen(format, (uint16_t)half)))
                continue;
            const double low = reference_widen(format, (uint16_t)half);
            const double last_place = ldexp(1, (low == 0 || ilogb(low) < -14 ? -14 : ilogb(low)) - format.mantissa_bits);
            const float middle = format.exponent_bits == 8 ? float_of(bits_of((float)low) + (1u << (dropped_bits - 1)))
                                                           : (float)(low + copysign(last_place / 2, low));
            const float around[] = {(float)low, nextafterf((float)low, INFINITY), nextafterf((float)low, -INFINITY),
                                    middle,     nextafterf(middle, INFINITY),     nextafterf(middle, -INFINITY)};
            for (unsigned i = 0; i < sizeof around / sizeof around[0]; i++) {
                values[count++] = around[i];
                if (count == DSS_BLOCK) {
                    check_narrow(&versions[v], values);
                    count = 0;
                }
            }
        }
        check_narrow(&versions[v], values);
    }
}

static void floats_of_all_sizes_round_right(void) {
    uint64_t random = 31;
    for (uint32_t block = 0; block < 2000; block++) {
        float values[DSS_BLOCK];
        for (uint32_t i = 0; i < DSS_BLOCK; i++) {
            uint32_t bits = (uint32_t)(check_random(&random) >> 32);
            if (block % 2) /* near the exponents of float16 */
                bits = (bits & 0x807fffff) | (100 + bits % 47) << 23;
            values[i] = float_of(bits);
        }
        for (unsigned v = 0; v < version_count; v++)
            check_narrow(&versions[v], values);
    }
}

static void nan_comes_out_quiet_with_its_sign_and_payload(void) {
    static const uint32_t nans[] = {0x7f800001, 0x7fc00000, 0xff800001, 0xffffffff, 0x7fa12345, 0xffd55555};
    for (unsigned v = 0; v < version_count; v++) {
        const int kept = versions[v].format.exponent_bits == 8 ? 16 : 13;
        float values[DSS_BLOCK] = {0};
        uint16_t halves[DSS_BLOCK];
        float again[DSS_BLOCK];
        for (unsigned i = 0; i < 6; i++)
            values[i] = float_of(nans[i]);
        narrow_block(&versions[v], values, halves);
        widen_block(&versions[v], halves, again);
        for (unsigned i = 0; i < 6; i++) {
            const uint32_t expected = ((nans[i] | 0x00400000) >> kept) << kept;
            CHECK_FOR(bits_of(again[i]) == expected, "%s: %#x came back as %#x, expected %#x", versions[v].name, nans[i],
                      bits_of(again[i]), expected);
        }
    }
}

static void random_floats(float *values, uint64_t *random) {
    for (uint32_t i = 0; i < DSS_BLOCK; i++)
        values[i] = float_of((uint32_t)(check_random(random) >> 32));
}

/* Ranks on different machines must write the same bits, NaN included: the plan's mean is compared between them. Each length up to a
 * few vectors is tried, since what does not fill a vector is done elsewhere. */
static void versions_agree_bit_for_bit(void) {
    uint64_t random = 47;
    for (unsigned v = 1; v < version_count; v++) {
        const dss_half_t *a = versions[v - 1].half;
        const dss_half_t *b = versions[v].half;
        if (versions[v - 1].format.exponent_bits != versions[v].format.exponent_bits)
            continue;
        for (uint32_t round = 0; round < 20000; round++) {
            const size_t length = round % 70;
            float floats[DSS_BLOCK];
            unsigned char results[2][4 * DSS_BLOCK];
            memset(results, 0x5a, sizeof results);
            random_floats(floats, &random);
            a->narrow((const unsigned char *)floats, results[0], length);
            b->narrow((const unsigned char *)floats, results[1], length);
            CHECK_FOR(memcmp(results[0], results[1], sizeof results[0]) == 0, "narrowing %zu by %s", length, b->name);
            a->widen((const unsigned char *)floats, results[0], length);
            b->widen((const unsigned char *)floats, results[1], length);
            CHECK_FOR(memcmp(results[0], results[1], sizeof results[0]) == 0, "widening %zu by %s", length, b->name);
        }
        for (uint64_t first = 0; first < 1ull << 32; first += 257 * DSS_BLOCK) { /* odd steps: all low bits occur */
            float floats[DSS_BLOCK];
            uint16_t results[2][DSS_BLOCK];
            for (uint32_t i = 0; i < DSS_BLOCK; i++)
                floats[i] = float_of((uint32_t)(first + 257ull * i));
            a->narrow((const unsigned char *)floats, (unsigned char *)results[0], DSS_BLOCK);
            b->narrow((const unsigned char *)floats, (unsigned char *)results[1], DSS_BLOCK);
            CHECK_FOR(memcmp(results[0], results[1], sizeof results[0]) == 0, "among %#" PRIx64 " and the blocks after it", first);
        }
    }
}

/* One operand at least is a number: which of two NaN survives is not promised. */
static void check_sums(const version_t *version, const uint16_t *left, const uint16_t *right, float scale, size_t length,
                       int in_place) {
    unsigned char odd[3][3 + 2 * DSS_BLOCK];
    memset(odd, 0x5a, sizeof odd);
    memcpy(odd[0] + 1, left, 2 * length);
    memcpy(odd[1] + 1, right, 2 * length);
    unsigned char *target = odd[in_place] + 1; /* 0: the left, 1: the right, 2: apart */
    version->half->sum(odd[0] + 1, odd[1] + 1, scale, target, length);
    CHECK_FOR(target[-1] == 0x5a && target[2 * length] == 0x5a, "%s wrote beyond its %zu", version->name, length);
    for (size_t i = 0; i < length; i++) {
        const float l = (float)reference_widen(version->format, left[i]);
        const float r = (float)reference_widen(version->format, right[i]);
        volatile float sum = l + r;
        uint16_t half;
        sum = sum * scale;
        memcpy(&half, target + 2 * i, sizeof half);
        CHECK_FOR(isnan(sum) ? is_nan_half(version->format, half) : half == reference_narrow(version->format, sum),
                  "%s: (%#x + %#x) * %g became %#x", version->name, left[i], right[i], (double)scale, half);
        if (is_nan_half(version->format, left[i])) /* sign and payload are kept */
            CHECK_FOR(half == (left[i] | 1 << (version->format.mantissa_bits - 1)), "%s: %#x became %#x", version->name, left[i],
                      half);
    }
}

static void sums_round_once_for_every_value(void) {
    static const uint16_t partners[] = {0x0000, 0x8000, 0x0001, 0x3c00, 0xbf81, 0x7bff, 0x7c00, 0xff80, 0x4248, 0x0380};
    static const float scales[] = {1, 0.5f, 1.0f / 3};
    for (unsigned v = 0; v < version_count; v++)
        for (unsigned p = 0; p < sizeof partners / sizeof partners[0]; p++)
            for (uint32_t first = 0; first < 65536; first += DSS_BLOCK) {
                uint16_t left[DSS_BLOCK];
                uint16_t right[DSS_BLOCK];
                for (uint32_t i = 0; i < DSS_BLOCK; i++) {
                    left[i] = (uint16_t)(first + i);
                    right[i] = is_nan_half(versions[v].format, partners[p]) ? 0 : partners[p];
                }
                check_sums(&versions[v], left, right, scales[(p + first / DSS_BLOCK) % 3], DSS_BLOCK, (int)(p % 3));
            }
}

static void sums_of_any_length_are_complete(void) {
    uint64_t random = 53;
    for (unsigned v = 0; v < version_count; v++)
        for (uint32_t round = 0; round < 3000; round++) {
            uint16_t left[80];
            uint16_t right[80];
            for (uint32_t i = 0; i < 80; i++) {
                left[i] = (uint16_t)(check_random(&random) >> 48);
                right[i] = (uint16_t)(check_random(&random) >> 48);
                right[i] = is_nan_half(versions[v].format, right[i]) ? 0x3c00 : right[i];
            }
            check_sums(&versions[v], left, right, 0.5f, round % 80, (int)(round / 80 % 3));
        }
}

static void find_versions(dss_dtype_t dtype, half_format_t format) {
    for (unsigned number = 0; dss_half_version(dtype, number); number++) {
        const dss_half_t *half = dss_half_version(dtype, number);
        versions[version_count++] = (version_t){half, half->name, format};
    }
}

int main(void) {
    find_versions(DSS_BFLOAT16, bfloat16_format);
    find_versions(DSS_FLOAT16, float16_format);
    RUN(every_value_widens_exactly);
    RUN(every_value_survives_the_round_trip);
    RUN(midpoints_round_to_even);
    RUN(floats_of_all_sizes_round_right);
    RUN(nan_comes_out_quiet_with_its_sign_and_payload);
    RUN(versions_agree_bit_for_bit);
    RUN(sums_round_once_for_every_value);
    RUN(sums_of_any_length_are_complete);
}
