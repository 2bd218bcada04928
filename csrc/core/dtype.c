/* What a dtype is, and how its elements get into and out of the dtype that they are summed in. */
#include <string.h>

#include "dssync.h"
#include "half.h"

typedef struct dtype_info {
    const char *name;
    size_t bytes;
    dss_dtype_t accumulator;
} dtype_info_t;

static const dtype_info_t dtypes[] = {
    [DSS_FLOAT32] = {"float32", 4, DSS_FLOAT32}, [DSS_FLOAT64] = {"float64", 8, DSS_FLOAT64},
    [DSS_FLOAT16] = {"float16", 2, DSS_FLOAT32}, [DSS_BFLOAT16] = {"bfloat16", 2, DSS_FLOAT32},
    [DSS_INT8] = {"int8", 1, DSS_INT8},          [DSS_UINT8] = {"uint8", 1, DSS_UINT8},
    [DSS_INT32] = {"int32", 4, DSS_INT32},       [DSS_INT64] = {"int64", 8, DSS_INT64},
};

/* NULL for an unknown dtype. */
static const dtype_info_t *find_info(dss_dtype_t dtype) {
    return (size_t)dtype < sizeof dtypes / sizeof dtypes[0] ? &dtypes[dtype] : NULL;
}

size_t dss_dtype_bytes(dss_dtype_t dtype) {
    const dtype_info_t *info = find_info(dtype);
    return info ? info->bytes : 0;
}

dss_dtype_t dss_dtype_accumulator(dss_dtype_t dtype) {
    const dtype_info_t *info = find_info(dtype);
    return info ? info->accumulator : dtype;
}

const char *dss_dtype_name(dss_dtype_t dtype) {
    const dtype_info_t *info = find_info(dtype);
    return info ? info->name : "unknown";
}

dss_status_t dss_widen(dss_dtype_t dtype, const void *source, void *accumulator, size_t element_count) {
    if (!dss_dtype_bytes(dtype) || ((!source || !accumulator) && element_count))
        return DSS_ERR_INVALID_ARGUMENT;
    const dss_half_t *half = dss_half_fastest(dtype);
    if (half)
        half->widen(source, accumulator, element_count);
    else if (element_count)
        memmove(accumulator, source, element_count * dss_dtype_bytes(dtype));
    return DSS_OK;
}

static void scale_f32(const unsigned char *source, double scale, unsigned char *target, size_t count) {
    const float factor = (float)scale;
    const int is_exact = factor == scale; /* then float32 rounds the product like float64 does, in half the time */
    if (is_exact) {
        DSS_ELEMENTWISE
        for (size_t i = 0; i < count; i++) {
            float value;
            memcpy(&value, source + i * sizeof value, sizeof value);
            value *= factor;
            memcpy(target + i * sizeof value, &value, sizeof value);
        }
        return;
    }
    DSS_ELEMENTWISE
    for (size_t i = 0; i < count; i++) {
        float value;
        memcpy(&value, source + i * sizeof value, sizeof value);
        value = (float)(value * scale);
        memcpy(target + i * sizeof value, &value, sizeof value);
    }
}

static void scale_f64(const unsigned char *source, double scale, unsigned char *target, size_t count) {
    DSS_ELEMENTWISE
    for (size_t i = 0; i < count; i++) {
        double value;
        memcpy(&value, source + i * sizeof value, sizeof value);
        value *= scale;
        memcpy(target + i * sizeof value, &value, sizeof value);
    }
}

static void narrow_half(const dss_half_t *half, const unsigned char *accumulator, double scale, unsigned char *target,
                        size_t count) {
    if (scale == 1) {
        half->narrow(accumulator, target, count);
        return;
    }
    for (size_t begin = 0; begin < count; begin += DSS_BLOCK) {
        unsigned char scaled[DSS_BLOCK * sizeof(float)];
        const size_t length = count - begin < DSS_BLOCK ? count - begin : DSS_BLOCK;
        scale_f32(accumulator + begin * sizeof(float), scale, scaled, length);
        half->narrow(scaled, target + 2 * begin, length);
    }
}

dss_status_t dss_narrow_scaled(dss_dtype_t dtype, const void *accumulator, double scale, void *target, size_t element_count) {
    const int is_integer = dss_reduction_takes(DSS_BAND, dtype);
    if (!dss_dtype_bytes(dtype) || (is_integer && scale != 1) || ((!accumulator || !target) && element_count))
        return DSS_ERR_INVALID_ARGUMENT;
    const dss_half_t *half = dss_half_fastest(dtype);
    if (half)
        narrow_half(half, accumulator, scale, target, element_count);
    else if (dtype == DSS_FLOAT32 && scale != 1)
        scale_f32(accumulator, scale, target, element_count);
    else if (dtype == DSS_FLOAT64 && scale != 1)
        scale_f64(accumulator, scale, target, element_count);
    else if (target != accumulator && element_count)
        memcpy(target, accumulator, element_count * dss_dtype_bytes(dtype));
    return DSS_OK;
}
