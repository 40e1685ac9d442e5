/* SPDX-License-Identifier: MIT */
#include "comm/fabric/library.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "src/log.h"

static poe_libfabric library;
static bool loaded;
static char reason[256];

static bool find(void *handle, const char *name, void *function)
{
    void *found = dlsym(handle, name);
    memcpy(function, &found, sizeof(found));
    return found != NULL;
}

static void load(void)
{
    void *handle = dlopen("libfabric.so.1", RTLD_NOW | RTLD_LOCAL); /* for good: its threads and exit handlers stay */
    loaded = handle && find(handle, "fi_getinfo", &library.getinfo) && find(handle, "fi_dupinfo", &library.dupinfo) &&
             find(handle, "fi_freeinfo", &library.freeinfo) && find(handle, "fi_fabric", &library.fabric) &&
             find(handle, "fi_open", &library.open) && find(handle, "fi_strerror", &library.strerror);
    if (!loaded)
        snprintf(reason, sizeof(reason), "%s", dlerror());
}

const poe_libfabric *poe_libfabric_load(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    if (loaded)
        return &library;
    poe_error("--transport fabric: libfabric cannot be loaded (%s); install the Debian package libfabric1, or give mpi",
              reason);
    return NULL;
}
