/* SPDX-License-Identifier: MIT
 * Safetensors files: written and read again, headers that must be refused, and seeded mutations of a good file. */
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/files.h"
#include "src/log.h"
#include "src/rng.h"
#include "src/safetensors.h"
#include "tests/check.h"

static char folder[] = "/tmp/poe-safetensors-XXXXXX";
static poe_log *quiet;

static void in_folder(char path[POE_PATH_MAX], const char *name)
{
    CHECK_INT(poe_path(path, "%s/%s", folder, name), POE_OK);
}

static void write_bytes(const char *path, const void *data, size_t size)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, size, f) == size && fclose(f) == 0);
}

/* Opening is expected to fail, so its sentence is kept from the screen. */
static poe_status open_quietly(const char *path, poe_safetensors **file)
{
    poe_log_attach(quiet);
    poe_log_hold();
    poe_status status = poe_safetensors_open(path, file);
    poe_log_settle(false);
    poe_log_attach(NULL);
    return status;
}

static const poe_safetensor tensors[] = {
    {"wte.weight", 2, {5, 3}, POE_F32},
    {"resid_lambdas", 1, {7}, POE_F32},
    {"h.0.c_q.weight", 2, {3, 4}, POE_BF16},
    {"empty", 2, {0, 9}, POE_F32},
};

static float value(size_t tensor, size_t i)
{
    return (float)(tensor + 1) * 0.37f - (float)i * 1.7f;
}

/* Pieces in mixed order. */
static poe_status write_file(const char *path)
{
    poe_safetensors_writer *writer;
    float values[15];
    poe_status status = poe_safetensors_writer_create(path, tensors, 4, &writer);
    CHECK_INT(status, POE_OK);
    if (status)
        return status;
    for (size_t i = 0; i < 12; i++)
        values[i] = value(2, i);
    CHECK_INT(poe_safetensors_writer_write(writer, "h.0.c_q.weight", 0, 12, values), POE_OK);
    for (size_t i = 0; i < 15; i++)
        values[i] = value(0, i);
    CHECK_INT(poe_safetensors_writer_write(writer, "wte.weight", 6, 9, values + 6), POE_OK);
    CHECK_INT(poe_safetensors_writer_write(writer, "wte.weight", 0, 6, values), POE_OK);
    for (size_t i = 0; i < 7; i++) {
        float one = value(1, i);
        CHECK_INT(poe_safetensors_writer_write(writer, "resid_lambdas", i, 1, &one), POE_OK);
    }
    return poe_safetensors_writer_finish(writer);
}

static void check_round_trip(void)
{
    char path[POE_PATH_MAX];
    poe_safetensors *file;
    float values[15];
    in_folder(path, "good.safetensors");
    CHECK_INT(write_file(path), POE_OK);
    CHECK_INT(poe_safetensors_open(path, &file), POE_OK);
    CHECK_INT(poe_safetensors_count(file), 4);
    CHECK(poe_safetensors_find(file, "wte") == NULL);
    for (size_t t = 0; t < 3; t++) {
        const poe_safetensor *tensor = poe_safetensors_find(file, tensors[t].name);
        CHECK(tensor && tensor->dtype == tensors[t].dtype && tensor->ndim == tensors[t].ndim);
        size_t n = tensor->shape[0] * tensor->shape[1];
        poe_safetensors_read(file, tensor, 0, n, values);
        /* bf16 keeps 8 significant bits: rounding moves by at most 2^-8 of the value */
        for (size_t i = 0; i < n; i++)
            CHECK_NEAR(values[i], value(t, i), tensor->dtype == POE_BF16 ? 1.0 / 256 : 0, 0);
        poe_safetensors_read(file, tensor, 2, 3, values);
        CHECK_NEAR(values[0], value(t, 2), tensor->dtype == POE_BF16 ? 1.0 / 256 : 0, 0);
    }
    poe_safetensors_close(file);
    poe_safetensors_close(NULL);
}

static void check_bf16_rounding(void)
{
    static const float in[] = {1.0f,
                               1.00390625f /* tie, down to even */,
                               1.01171875f /* tie, up to even */,
                               1.0039064f /* just above the tie */,
                               -0.0f,
                               3.4e38f,
                               INFINITY,
                               NAN};
    static const float out[] = {1.0f, 1.0f, 1.015625f, 1.0078125f, -0.0f, INFINITY, INFINITY};
    const poe_safetensor tensor = {"x", 1, {8, 1}, POE_BF16};
    char path[POE_PATH_MAX];
    float values[8];
    poe_safetensors_writer *writer;
    poe_safetensors *file;
    in_folder(path, "bf16.safetensors");
    CHECK_INT(poe_safetensors_writer_create(path, &tensor, 1, &writer), POE_OK);
    CHECK_INT(poe_safetensors_writer_write(writer, "x", 0, 8, in), POE_OK);
    CHECK_INT(poe_safetensors_writer_finish(writer), POE_OK);
    CHECK_INT(poe_safetensors_open(path, &file), POE_OK);
    poe_safetensors_read(file, poe_safetensors_at(file, 0), 0, 8, values);
    CHECK_INT(memcmp(values, out, sizeof(out)), 0);
    CHECK(isnan(values[7]));
    poe_safetensors_close(file);
}

/* What was not written, or written twice, must not become a file. */
static void check_incomplete(void)
{
    char path[POE_PATH_MAX];
    float values[15] = {0};
    in_folder(path, "incomplete.safetensors");
    poe_log_attach(quiet);
    for (int given = 0; given < 3; given++) {
        poe_safetensors_writer *writer;
        CHECK_INT(poe_safetensors_writer_create(path, tensors, 2, &writer), POE_OK);
        CHECK_INT(poe_safetensors_writer_write(writer, "resid_lambdas", 0, 7, values), POE_OK);
        if (given > 0)
            CHECK_INT(poe_safetensors_writer_write(writer, "wte.weight", 0, 15, values), POE_OK);
        if (given > 1)
            CHECK_INT(poe_safetensors_writer_write(writer, "wte.weight", 4, 2, values), POE_OK);
        poe_log_hold();
        CHECK_INT(poe_safetensors_writer_finish(writer), given == 1 ? POE_OK : POE_FAILED);
        poe_log_settle(false);
        CHECK_INT(access(path, F_OK), given == 1 ? 0 : -1);
        unlink(path);
        char temporary[POE_PATH_MAX];
        in_folder(temporary, "incomplete.safetensors.tmp");
        CHECK_INT(access(temporary, F_OK), -1);
    }
    poe_log_attach(NULL);
}

/* Headers with 16 bytes of data behind them. */
static void check_refused(void)
{
    static const struct {
        const char *header;
        poe_status expected;
    } cases[] = {
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}", POE_OK},
        {"{\"__metadata__\":{\"a\":\"b\"},\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[4,8]}}", POE_OK},
        {"{}   ", POE_OK},
        {"", POE_BAD_INPUT},
        {"[]", POE_BAD_INPUT},
        {"{\"a\":3}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,4]}}", POE_BAD_INPUT},
        {"{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,2],\"data_offsets\":[0,8]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[12,20]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,0]}}", POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
         POE_BAD_INPUT},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}",
         POE_BAD_INPUT},
    };
    char path[POE_PATH_MAX], bytes[1024];
    in_folder(path, "refused.safetensors");
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        poe_safetensors *file;
        size_t length = strlen(cases[i].header);
        memset(bytes, 0, sizeof(bytes));
        bytes[0] = (char)length;
        bytes[1] = (char)(length >> 8);
        memcpy(bytes + 8, cases[i].header, length);
        write_bytes(path, bytes, 8 + length + 16);
        poe_status status = open_quietly(path, &file);
        if (status != cases[i].expected)
            fprintf(stderr, "header %s\n", cases[i].header);
        CHECK_INT(status, cases[i].expected);
        if (!status)
            poe_safetensors_close(file);
    }
    poe_safetensors *file;
    write_bytes(path, "\377\377\377\377\377\377\377\377{}", 10); /* a header longer than any file */
    CHECK_INT(open_quietly(path, &file), POE_BAD_INPUT);
    write_bytes(path, "\0\0\0", 3);
    CHECK_INT(open_quietly(path, &file), POE_BAD_INPUT);
    CHECK_INT(open_quietly(folder, &file), POE_BAD_INPUT);
    CHECK_INT(open_quietly("/nonexistent", &file), POE_BAD_INPUT);
}

/* No mutation may crash, and what opens can be read whole. */
static void check_mutations(void)
{
    char path[POE_PATH_MAX], *good;
    size_t size;
    in_folder(path, "good.safetensors");
    CHECK_INT(poe_read_file(path, "test", &good, &size), POE_OK);
    in_folder(path, "mutant.safetensors");
    char *bytes = malloc(size);
    poe_rng rng;
    poe_rng_init(&rng, 3, "safetensors");
    for (int round = 0; round < 4000; round++) {
        memcpy(bytes, good, size);
        size_t length = poe_rng_next(&rng) % 8 ? size : poe_rng_next(&rng) % size;
        for (int n = 1 + (int)(poe_rng_next(&rng) % 4); n > 0; n--) {
            static const char likely[] = "0123456789{}[]\":,-.eF \\";
            uint64_t random = poe_rng_next(&rng);
            bytes[(random >> 32) % size] = random & 1 ? (char)(random >> 8) : likely[(random >> 8) % 23];
        }
        write_bytes(path, bytes, length);
        poe_safetensors *file;
        if (open_quietly(path, &file))
            continue;
        for (size_t i = 0; i < poe_safetensors_count(file); i++) {
            const poe_safetensor *tensor = poe_safetensors_at(file, i);
            size_t n = tensor->shape[0] * (tensor->ndim == 2 ? tensor->shape[1] : 1);
            CHECK(n <= size);
            float *values = malloc(4 * n + 1);
            poe_safetensors_read(file, tensor, 0, n, values);
            free(values);
        }
        poe_safetensors_close(file);
    }
    free(bytes);
    free(good);
}

/* A full disk: the device that always is one, under the temporary name. */
static void check_full_disk(void)
{
    char path[POE_PATH_MAX], temporary[POE_PATH_MAX];
    poe_safetensors_writer *writer;
    const poe_safetensor tensor = {"x", 1, {16, 1}, POE_F32};
    if (access("/dev/full", W_OK))
        return;
    in_folder(path, "full.safetensors");
    in_folder(temporary, "full.safetensors.tmp");
    CHECK_INT(symlink("/dev/full", temporary), 0);
    poe_log_attach(quiet);
    poe_log_hold();
    CHECK_INT(poe_safetensors_writer_create(path, &tensor, 1, &writer), POE_FAILED);
    poe_log_settle(false);
    poe_log_attach(NULL);
    CHECK_INT(access(path, F_OK), -1);
}

int main(void)
{
    quiet = poe_log_create(0, 1);
    CHECK(mkdtemp(folder) != NULL);
    check_round_trip();
    check_bf16_rounding();
    check_incomplete();
    check_refused();
    check_mutations();
    check_full_disk();
    CHECK_INT(poe_remove_tree(folder), POE_OK);
    poe_log_destroy(quiet);
    return check_result();
}
