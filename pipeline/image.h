/* SPDX-License-Identifier: MIT
 * A rank's state as one piece of memory: whoever has some passes it, in a fixed order, and it is copied out or, by the
 * same walk, back in. */
#ifndef POE_PIPELINE_IMAGE_H
#define POE_PIPELINE_IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

typedef struct poe_image {
    unsigned char *at; /* NULL: only measures */
    size_t bytes;      /* passed so far */
    bool restores;
} poe_image;

static inline void poe_image_pass(poe_image *image, void *memory, size_t bytes)
{
    if (image->at && image->restores)
        memcpy(memory, image->at + image->bytes, bytes);
    else if (image->at)
        memcpy(image->at + image->bytes, memory, bytes);
    image->bytes += bytes;
}

#endif
