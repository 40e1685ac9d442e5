/* SPDX-License-Identifier: MIT
 * metrics.jsonl of a process that was killed: cut back to where its snapshot says, again and again. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pipeline/metrics.h"
#include "tests/check.h"

static void write_line(poe_metrics *metrics, int step)
{
    CHECK_INT(poe_metrics_write(metrics, json_pack("{s:i}", "step", step)), POE_OK);
}

static void check_text(const char *path, const char *expected)
{
    char *text = NULL;
    size_t size;
    CHECK_INT(poe_read_file(path, "metrics", &text, &size), POE_OK);
    CHECK(text && size == strlen(expected) && strcmp(text, expected) == 0);
    free(text);
}

static void pass(poe_metrics *metrics, unsigned char *at, bool restores)
{
    poe_image image = {.at = at, .restores = restores};
    CHECK_INT(poe_metrics_image(metrics, &image), POE_OK);
}

int main(void)
{
    char folder[] = "/tmp/poe-metrics-XXXXXX", path[64];
    unsigned char snapshot[64];
    poe_metrics metrics = {0}, next = {0};
    if (!mkdtemp(folder))
        return 1;
    snprintf(path, sizeof(path), "%s/metrics.jsonl", folder);
    CHECK_INT(poe_metrics_open(&metrics, path, NULL, 0, 0), POE_OK);
    write_line(&metrics, 0);
    pass(&metrics, snapshot, false);
    write_line(&metrics, 1);
    write_line(&metrics, 2);
    for (int life = 0; life < 3; life++) { /* each takes a snapshot before it has written anything */
        CHECK_INT(poe_metrics_reopen(&next, path), POE_OK);
        pass(&next, snapshot, true);
        check_text(path, "{\"step\":0}\n");
        pass(&next, snapshot, false);
        write_line(&next, 1);
        check_text(path, "{\"step\":0}\n{\"step\":1}\n");
        poe_metrics_close(&next);
    }
    poe_metrics_close(&metrics);
    unlink(path);
    rmdir(folder);
    return check_result();
}
