/*
 * segments.h: a list of arrays seen as one flat vector, so that hundreds of tensors are exchanged without being packed first.
 */
#ifndef DSS_SEGMENTS_H
#define DSS_SEGMENTS_H

#include "dssync_engine.h"

typedef struct dss_segments {
    uint8_t **begins; /* of each array; owned, with `ends` */
    uint64_t *ends;   /* in bytes from the begin of the vector */
    size_t count;     /* arrays that are not empty */
    uint64_t bytes;   /* of all */
} dss_segments_t;

dss_status_t dss_segments_create(dss_segments_t *segments, const dss_segment_t *list, size_t list_count, size_t element_bytes);
void dss_segments_release(dss_segments_t *segments);
/* Where byte `at` of the vector lies, and how many bytes follow there in one piece. `at` is below the end. */
uint8_t *dss_segments_at(const dss_segments_t *segments, uint64_t at, size_t *piece_bytes_p);

#endif
