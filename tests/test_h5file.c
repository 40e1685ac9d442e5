/* SPDX-License-Identifier: MIT
 * HDF5 files and manifests: written and read again, wrong shapes and names, a full disk, and damaged folders, which
 * the manifest must find before HDF5 sees them. */
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/crc32c.h"
#include "src/files.h"
#include "src/h5file.h"
#include "src/log.h"
#include "src/manifest.h"
#include "src/rng.h"
#include "tests/check.h"

enum { ROWS = 37, COLS = 11 };

/* HDF5 does not free a file whose close failed; under the leak sanitizer that is its fault, not ours. */
__attribute__((visibility("default"))) const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:libhdf5";
}

static char folder[] = "/tmp/poe-h5file-XXXXXX";
static poe_log *log_context;
static float values[ROWS * COLS];

static void in_folder(char path[POE_PATH_MAX], const char *name)
{
    CHECK_INT(poe_path(path, "%s/%s", folder, name), POE_OK);
}

static poe_status write_file(const char *path)
{
    poe_h5 *file;
    poe_status status = poe_h5_create(path, &file);
    if (status)
        return status;
    poe_h5_write_integer(file, "/", "step", 42);
    poe_h5_write_integer(file, "/layers/3", "window", 128);
    poe_h5_write_text(file, "/layers/3", "kind", "short");
    poe_h5_write(file, "/parameters/h.0.weight", 2, (size_t[]){ROWS, COLS}, values);
    poe_h5_write(file, "/optimizer/h.0.weight/m", 1, (size_t[]){COLS}, values + 5);
    poe_h5_write_integer(file, "/optimizer/h.0.weight/m", "first", 7);
    return poe_h5_close(file);
}

static void note_dataset(void *arg, const char *path, int ndim, const size_t *shape)
{
    char *text = arg;
    sprintf(text + strlen(text), "%s %d %zu;", path, ndim, shape[0]);
}

static void check_round_trip(void)
{
    char path[POE_PATH_MAX], text[256] = "";
    poe_h5 *file;
    int64_t number = 0;
    float read[ROWS * COLS];
    in_folder(path, "good.h5");
    CHECK_INT(write_file(path), POE_OK);
    CHECK_INT(poe_h5_open(path, &file), POE_OK);
    CHECK_INT(poe_h5_read(file, "/parameters/h.0.weight", 2, (size_t[]){ROWS, COLS}, read), POE_OK);
    CHECK_INT(memcmp(read, values, sizeof(read)), 0);
    CHECK_INT(poe_h5_read(file, "/optimizer/h.0.weight/m", 1, (size_t[]){COLS}, read), POE_OK);
    CHECK_INT(memcmp(read, values + 5, COLS * sizeof(float)), 0);
    CHECK_INT(poe_h5_read_integer(file, "/", "step", &number), POE_OK);
    CHECK_INT(number, 42);
    CHECK_INT(poe_h5_read_integer(file, "/layers/3", "window", &number), POE_OK);
    CHECK_INT(number, 128);
    CHECK_INT(poe_h5_read_integer(file, "/optimizer/h.0.weight/m", "first", &number), POE_OK);
    CHECK_INT(number, 7);
    CHECK_INT(poe_h5_each(file, note_dataset, text), POE_OK);
    CHECK_STRING(text, "/optimizer/h.0.weight/m 1 11;/parameters/h.0.weight 2 37;");
    CHECK_INT(poe_h5_close(file), POE_OK);
}

/* Equal contents give equal bytes, at another time too. */
static void check_reproducible(void)
{
    char path[POE_PATH_MAX], again[POE_PATH_MAX];
    uint64_t size[2];
    uint32_t crc[2];
    in_folder(path, "good.h5");
    in_folder(again, "again.h5");
    sleep(1);
    CHECK_INT(write_file(again), POE_OK);
    CHECK_INT(poe_checksum_file(path, &size[0], &crc[0]), POE_OK);
    CHECK_INT(poe_checksum_file(again, &size[1], &crc[1]), POE_OK);
    CHECK(size[0] == size[1] && crc[0] == crc[1]);
}

/* Each wrong question on a file of its own: a file keeps its first failure. */
static void check_refused(void)
{
    char path[POE_PATH_MAX];
    in_folder(path, "good.h5");
    poe_log_hold();
    for (int question = 0; question < 5; question++) {
        poe_h5 *file;
        poe_status status = POE_OK;
        int64_t number;
        float read[ROWS * COLS];
        CHECK_INT(poe_h5_open(path, &file), POE_OK);
        if (question == 0)
            status = poe_h5_read(file, "/parameters/none", 1, (size_t[]){1}, read);
        if (question == 1)
            status = poe_h5_read(file, "/parameters/h.0.weight", 1, (size_t[]){ROWS}, read);
        if (question == 2)
            status = poe_h5_read(file, "/parameters/h.0.weight", 2, (size_t[]){COLS, ROWS}, read);
        if (question == 3)
            status = poe_h5_read_integer(file, "/layers/4", "window", &number);
        if (question == 4)
            status = poe_h5_read_integer(file, "/layers/3", "kind", &number);
        CHECK_INT(status, POE_BAD_INPUT);
        CHECK_INT(poe_h5_close(file), POE_BAD_INPUT);
    }
    poe_h5 *file;
    in_folder(path, "none.h5");
    CHECK_INT(poe_h5_open(path, &file), POE_BAD_INPUT);
    in_folder(path, "none/none.h5");
    CHECK_INT(poe_h5_create(path, &file), POE_FAILED);
    poe_log_settle(false);
}

static int open_files(void)
{
    int count = 0;
    for (int fd = 0; fd < 1024; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

/* A disk that ends after 0 to 64 KiB, by the limit of what this process may write to a file. */
static void check_full_disk(void)
{
    char path[POE_PATH_MAX];
    struct rlimit before, small;
    int files = open_files();
    in_folder(path, "full.h5");
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before);
    small = before;
    poe_log_hold();
    for (small.rlim_cur = 0; small.rlim_cur < 65536; small.rlim_cur += 512) {
        setrlimit(RLIMIT_FSIZE, &small);
        poe_status status = write_file(path);
        setrlimit(RLIMIT_FSIZE, &before);
        if (status) {
            CHECK_INT(status, POE_FAILED);
            continue;
        }
        poe_h5 *file;
        CHECK_INT(poe_h5_open(path, &file), POE_OK);
        CHECK_INT(poe_h5_close(file), POE_OK);
        break;
    }
    CHECK(small.rlim_cur > 1024 && small.rlim_cur < 65536);
    poe_log_settle(false);
    CHECK_INT(open_files(), files); /* an open one would keep its space */
    unlink(path);
}

static void make_checkpoint(char path[POE_PATH_MAX], const char *name)
{
    char file[POE_PATH_MAX];
    poe_manifest_file entry = {.name = "stage-000.h5"};
    in_folder(path, name);
    CHECK_INT(poe_make_directories(path), POE_OK);
    CHECK_INT(poe_path(file, "%s/stage-000.h5", path), POE_OK);
    CHECK_INT(write_file(file), POE_OK);
    CHECK_INT(poe_checksum_file(file, &entry.size, &entry.crc), POE_OK);
    json_t *facts = json_pack("{s:i, s:f, s:{s:s}}", "step", 42, "loss", 0.1, "config", "head", "ps");
    CHECK_INT(poe_manifest_write(path, facts, &entry, 1), POE_OK);
    json_decref(facts);
}

static poe_status check_whole(const char *path)
{
    json_t *facts;
    poe_status status = poe_manifest_read(path, false, &facts);
    if (!status) {
        status = poe_manifest_check(path, facts, NULL, false);
        json_decref(facts);
    }
    return status;
}

static void check_manifest(void)
{
    char path[POE_PATH_MAX];
    json_t *facts;
    make_checkpoint(path, "step-00000042");
    CHECK_INT(check_whole(path), POE_OK);
    CHECK_INT(poe_manifest_read(path, true, &facts), POE_OK);
    CHECK_INT(json_integer_value(json_object_get(facts, "step")), 42);
    CHECK_NEAR(json_real_value(json_object_get(facts, "loss")), 0.1, 0, 0);
    CHECK_INT(poe_manifest_check(path, facts, "stage-000.h5", true), POE_OK);
    CHECK_INT(poe_manifest_check(path, facts, "stage-001.h5", false), POE_BAD_INPUT);
    json_decref(facts);
    in_folder(path, "nothing");
    CHECK_INT(poe_manifest_read(path, false, &facts), POE_BAD_INPUT);
}

/* Nothing in a damaged folder may pass, unless it says the same as before (a space in the JSON). */
static void check_mutations(void)
{
    char path[POE_PATH_MAX], file[POE_PATH_MAX], *good[2];
    static const char *const names[] = {"manifest.json", "stage-000.h5"};
    size_t size[2];
    poe_rng rng;
    poe_rng_init(&rng, 5, "checkpoint");
    make_checkpoint(path, "step-00000043");
    for (int i = 0; i < 2; i++) {
        CHECK_INT(poe_path(file, "%s/%s", path, names[i]), POE_OK);
        CHECK_INT(poe_read_file(file, "test", &good[i], &size[i]), POE_OK);
    }
    for (int round = 0; round < 3000; round++) {
        int which = round % 2;
        size_t length = poe_rng_next(&rng) % 8 ? size[which] : poe_rng_next(&rng) % size[which];
        char *bytes = malloc(size[which] + 1);
        memcpy(bytes, good[which], size[which]);
        size_t place = poe_rng_next(&rng) % size[which];
        bytes[place] = (char)(bytes[place] ^ (1 + poe_rng_next(&rng) % 255));
        CHECK_INT(poe_path(file, "%s/%s", path, names[which]), POE_OK);
        FILE *f = fopen(file, "wb");
        CHECK(f && fwrite(bytes, 1, length, f) == length && fclose(f) == 0);
        bool space = which == 0 && strchr(" \t\r\n", bytes[place]) && length == size[which];
        CHECK(check_whole(path) == POE_BAD_INPUT || space);
        f = fopen(file, "wb");
        CHECK(f && fwrite(good[which], 1, size[which], f) == size[which] && fclose(f) == 0);
        free(bytes);
    }
    CHECK_INT(check_whole(path), POE_OK);
    free(good[0]);
    free(good[1]);
}

static void check_list_and_clean(void)
{
    static const char *const names[] = {"c/step-00000005",  "c/step-00000030", "c/step-00000100",
                                        "c/step-123456789", "c/step-7",        "c/.step-00000200.tmp",
                                        "c/other"};
    char path[POE_PATH_MAX];
    int64_t *steps;
    int count;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        in_folder(path, names[i]);
        CHECK_INT(poe_make_directories(path), POE_OK);
    }
    in_folder(path, "c");
    CHECK_INT(poe_checkpoint_clean(path, 100, 0), POE_OK);
    CHECK_INT(poe_checkpoint_list(path, &steps, &count), POE_OK);
    CHECK_INT(count, 4);
    CHECK(count == 4 && steps[0] == 123456789 && steps[1] == 100 && steps[2] == 30 && steps[3] == 5);
    free(steps);
    CHECK_INT(poe_checkpoint_clean(path, 100, 1), POE_OK);
    CHECK_INT(poe_checkpoint_list(path, &steps, &count), POE_OK);
    CHECK(count == 2 && steps[0] == 123456789 && steps[1] == 100);
    free(steps);
    in_folder(path, "c/.step-00000200.tmp");
    CHECK_INT(access(path, F_OK), -1);
    in_folder(path, "c/other");
    CHECK_INT(access(path, F_OK), 0);
    in_folder(path, "d");
    CHECK_INT(poe_checkpoint_list(path, &steps, &count), POE_OK);
    CHECK_INT(count, 0);
    free(steps);
}

int main(void)
{
    log_context = poe_log_create(0, 1);
    poe_log_attach(log_context);
    CHECK(mkdtemp(folder) != NULL);
    poe_rng rng;
    poe_rng_init(&rng, 1, "values");
    for (size_t i = 0; i < ROWS * COLS; i++)
        values[i] = (float)poe_rng_normal(&rng);
    check_round_trip();
    check_reproducible();
    check_refused();
    check_full_disk();
    check_manifest();
    check_mutations();
    check_list_and_clean();
    CHECK_INT(poe_remove_tree(folder), POE_OK);
    poe_log_destroy(log_context);
    return check_result();
}
