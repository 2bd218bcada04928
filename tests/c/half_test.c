#include "check.h"

#include "half.h"
#include "half_reference.h"

typedef void (*widen_t)(const unsigned char *source, float *target);
typedef void (*narrow_t)(const float *source, unsigned char *target);

typedef struct version {
    const char *name;
    half_format_t format;
    widen_t widen;
    narrow_t narrow;
} version_t;

static version_t versions[3];
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
    version->widen(odd + 1, values);
}

static void narrow_block(const version_t *version, const float *values, uint16_t *halves) {
    unsigned char odd[1 + 2 * DSS_BLOCK + 1];
    odd[0] = odd[2 * DSS_BLOCK + 1] = 0x5a;
    version->narrow(values, odd + 1);
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

#ifdef DSS_HAVE_F16C
/* Ranks with and without F16C must write the same bits, NaN included: the plan's mean is compared between them. */
static void instructions_and_integers_agree_bit_for_bit(void) {
    if (!dss_cpu_has_f16c()) {
        printf("   skipped: this CPU has no F16C\n");
        return;
    }
    for (uint32_t first = 0; first < 65536; first += DSS_BLOCK) {
        uint16_t halves[DSS_BLOCK];
        float a[DSS_BLOCK];
        float b[DSS_BLOCK];
        for (uint32_t i = 0; i < DSS_BLOCK; i++)
            halves[i] = (uint16_t)(first + i);
        dss_float16_widen_portable((const unsigned char *)halves, a);
        dss_float16_widen_f16c((const unsigned char *)halves, b);
        CHECK_FOR(memcmp(a, b, sizeof a) == 0, "among %#x and the %u after it", first, DSS_BLOCK);
    }
    for (uint64_t first = 0; first < 1ull << 32; first += 257 * DSS_BLOCK) { /* odd steps: all low bits occur */
        float values[DSS_BLOCK];
        uint16_t a[DSS_BLOCK];
        uint16_t b[DSS_BLOCK];
        for (uint32_t i = 0; i < DSS_BLOCK; i++)
            values[i] = float_of((uint32_t)(first + 257ull * i));
        dss_float16_narrow_portable(values, (unsigned char *)a);
        dss_float16_narrow_f16c(values, (unsigned char *)b);
        CHECK_FOR(memcmp(a, b, sizeof a) == 0, "among %#" PRIx64 " and the blocks after it", first);
    }
}
#endif

int main(void) {
    versions[version_count++] = (version_t){"bfloat16", bfloat16_format, dss_bfloat16_widen, dss_bfloat16_narrow};
    versions[version_count++] =
        (version_t){"float16 by integers", float16_format, dss_float16_widen_portable, dss_float16_narrow_portable};
#ifdef DSS_HAVE_F16C
    if (dss_cpu_has_f16c())
        versions[version_count++] = (version_t){"float16 by F16C", float16_format, dss_float16_widen_f16c, dss_float16_narrow_f16c};
    RUN(instructions_and_integers_agree_bit_for_bit);
#endif
    RUN(every_value_widens_exactly);
    RUN(every_value_survives_the_round_trip);
    RUN(midpoints_round_to_even);
    RUN(floats_of_all_sizes_round_right);
    RUN(nan_comes_out_quiet_with_its_sign_and_payload);
}
