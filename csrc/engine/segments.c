#include "segments.h"

#include <stdlib.h>

dss_status_t dss_segments_create(dss_segments_t *segments, const dss_segment_t *list, size_t list_count, size_t element_bytes) {
    *segments = (dss_segments_t){0};
    if (list_count == 0)
        return DSS_OK;
    segments->begins = malloc(list_count * sizeof *segments->begins);
    segments->ends = malloc(list_count * sizeof *segments->ends);
    if (!segments->begins || !segments->ends) {
        dss_segments_release(segments);
        return DSS_ERR_NO_MEMORY;
    }
    for (size_t i = 0; i < list_count; i++) {
        if (list[i].element_count == 0)
            continue;
        if (!list[i].values || list[i].element_count > (UINT64_MAX / 4 - segments->bytes) / element_bytes) {
            dss_segments_release(segments);
            return DSS_ERR_INVALID_ARGUMENT;
        }
        segments->bytes += list[i].element_count * element_bytes;
        segments->begins[segments->count] = list[i].values;
        segments->ends[segments->count++] = segments->bytes;
    }
    return DSS_OK;
}

void dss_segments_release(dss_segments_t *segments) {
    free(segments->begins);
    free(segments->ends);
    *segments = (dss_segments_t){0};
}

uint8_t *dss_segments_at(const dss_segments_t *segments, uint64_t at, size_t *piece_bytes_p) {
    size_t low = 0;
    size_t high = segments->count - 1; /* the first whose end lies behind `at` */
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (segments->ends[middle] > at)
            high = middle;
        else
            low = middle + 1;
    }
    const uint64_t begin = low == 0 ? 0 : segments->ends[low - 1];
    *piece_bytes_p = (size_t)(segments->ends[low] - at);
    return segments->begins[low] + (at - begin);
}
