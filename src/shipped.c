/* SPDX-License-Identifier: MIT */
#include "src/shipped.h"

#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "src/log.h"

poe_status poe_shipped_text(char path[POE_PATH_MAX])
{
    /* Seen from PREFIX/bin, build and build/tests. */
    static const char *const folders[] = {"../share/poe-pipe", "../data", "../../data"};
    char program[POE_PATH_MAX] = "", place[POE_PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", program, sizeof(program) - 1);
    const char *here = length > 0 ? dirname(program) : ".";
    for (size_t i = 0; i < sizeof(folders) / sizeof(folders[0]); i++) {
        poe_status status = poe_path(place, "%s/%s/tinyshakespeare.txt", here, folders[i]);
        if (status != POE_OK)
            return status;
        if (access(place, R_OK) == 0 && realpath(place, path))
            return POE_OK;
    }
    poe_error("--data FILE is missing, and the text that ships with poe-pipe is not beside the program in %s", here);
    return POE_BAD_INPUT;
}
