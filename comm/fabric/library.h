/* SPDX-License-Identifier: MIT
 * libfabric, loaded when it is first needed: what it depends on takes a fifth of a second to load, which every other
 * command would pay. These are the calls that are its own; all others go through the objects that they return. */
#ifndef POE_COMM_FABRIC_LIBRARY_H
#define POE_COMM_FABRIC_LIBRARY_H

#include <rdma/fabric.h>

typedef struct poe_libfabric {
    int (*getinfo)(uint32_t version, const char *node, const char *service, uint64_t flags, const struct fi_info *hints,
                   struct fi_info **info);
    struct fi_info *(*dupinfo)(const struct fi_info *info); /* NULL: an empty one */
    void (*freeinfo)(struct fi_info *info);
    int (*fabric)(struct fi_fabric_attr *attributes, struct fid_fabric **fabric, void *context);
    int (*open)(uint32_t version, const char *name, void *attributes, size_t bytes, uint64_t flags, struct fid **fid,
                void *context);
    const char *(*strerror)(int error);
} poe_libfabric;

/* NULL when there is none, said. Thread-safe. */
const poe_libfabric *poe_libfabric_load(void);

#endif
