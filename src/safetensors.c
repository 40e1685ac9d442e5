/* SPDX-License-Identifier: MIT */
#include "src/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/bf16.h"
#include "src/files.h"
#include "src/log.h"
#include "src/pieces.h"

/* A tensor and where its bytes are: begin and end count from the start of the data, which follows the header. The
 * public part comes first, so that a pointer to it is one to the entry. */
typedef struct entry {
    poe_safetensor tensor;
    uint64_t begin, end;
} entry;

struct poe_safetensors {
    unsigned char *map;
    size_t size;               /* of the file */
    const unsigned char *data; /* within map */
    uint64_t data_size;
    entry *entries;
    size_t count;
};

static size_t dtype_size(poe_dtype dtype)
{
    return dtype == POE_F32 ? 4 : 2;
}

static const char *dtype_name(poe_dtype dtype)
{
    return dtype == POE_F32 ? "F32" : "BF16";
}

static uint64_t elements(const poe_safetensor *tensor)
{
    return (uint64_t)tensor->shape[0] * (tensor->ndim == 2 ? tensor->shape[1] : 1);
}

/* --- reading ---------------------------------------------------------------------------------------------------- */

__attribute__((format(printf, 2, 3))) static poe_status refuse(const char *path, const char *format, ...)
{
    char why[512];
    va_list args;
    va_start(args, format);
    vsnprintf(why, sizeof(why), format, args);
    va_end(args);
    poe_error("%s is no safetensors file that can be used: %s", path, why);
    return POE_BAD_INPUT;
}

static poe_status parse_dtype(const char *path, const json_t *object, poe_safetensor *tensor)
{
    const char *name = json_string_value(json_object_get(object, "dtype"));
    if (name && strcmp(name, "F32") == 0)
        tensor->dtype = POE_F32;
    else if (name && strcmp(name, "BF16") == 0)
        tensor->dtype = POE_BF16;
    else
        return refuse(path, "tensor %s has dtype %.32s; F32 and BF16 are allowed", tensor->name,
                      name ? name : "(none)");
    return POE_OK;
}

/* Also gives the bytes that the shape asks for. */
static poe_status parse_shape(const char *path, const json_t *object, poe_safetensor *tensor, uint64_t *bytes)
{
    const json_t *shape = json_object_get(object, "shape");
    if (!json_is_array(shape) || json_array_size(shape) > 2)
        return refuse(path, "tensor %s has no shape of at most 2 dimensions", tensor->name);
    tensor->ndim = json_array_size(shape) == 2 ? 2 : 1;
    tensor->shape[0] = tensor->shape[1] = 1;
    *bytes = dtype_size(tensor->dtype);
    for (size_t i = 0; i < json_array_size(shape); i++) {
        const json_t *extent = json_array_get(shape, i);
        json_int_t n = json_integer_value(extent);
        if (!json_is_integer(extent) || n < 0 || __builtin_mul_overflow(*bytes, (uint64_t)n, bytes))
            return refuse(path, "dimension %zu of tensor %s is no size", i, tensor->name);
        tensor->shape[i] = (size_t)n;
    }
    return POE_OK;
}

static poe_status parse_entry(const char *path, const char *name, const json_t *object, uint64_t data_size, entry *e)
{
    uint64_t bytes = 0;
    if (strlen(name) >= sizeof(e->tensor.name))
        return refuse(path, "the name %.40s... is longer than %zu bytes", name, sizeof(e->tensor.name) - 1);
    strcpy(e->tensor.name, name);
    poe_status status = parse_dtype(path, object, &e->tensor);
    if (!status)
        status = parse_shape(path, object, &e->tensor, &bytes);
    if (status)
        return status;
    const json_t *offsets = json_object_get(object, "data_offsets");
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end))
        return refuse(path, "tensor %s has no data_offsets of two integers", name);
    json_int_t b = json_integer_value(begin), n = json_integer_value(end);
    if (b < 0 || n < b || (uint64_t)n > data_size)
        return refuse(path,
                      "tensor %s lies at %" JSON_INTEGER_FORMAT "..%" JSON_INTEGER_FORMAT ", the data has %llu bytes",
                      name, b, n, (unsigned long long)data_size);
    e->begin = (uint64_t)b;
    e->end = (uint64_t)n;
    if (e->end - e->begin != bytes)
        return refuse(path, "tensor %s has %llu bytes, its shape and dtype need %llu", name,
                      (unsigned long long)(e->end - e->begin), (unsigned long long)bytes);
    return POE_OK;
}

static int by_begin(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end; /* empty ones before what starts at the same place */
}

static poe_status parse_header(const char *path, const json_t *header, poe_safetensors *file)
{
    const char *name;
    json_t *object;
    file->entries = calloc(json_object_size(header) + 1, sizeof(*file->entries));
    if (!file->entries) {
        poe_error("not enough memory for the header of %s", path);
        return POE_FAILED;
    }
    json_object_foreach((json_t *)header, name, object) {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        poe_status status = parse_entry(path, name, object, file->data_size, &file->entries[file->count]);
        if (status)
            return status;
        file->count++;
    }
    qsort(file->entries, file->count, sizeof(*file->entries), by_begin);
    for (size_t i = 1; i < file->count; i++) {
        if (file->entries[i].begin < file->entries[i - 1].end)
            return refuse(path, "tensors %s and %s overlap", file->entries[i - 1].tensor.name,
                          file->entries[i].tensor.name);
    }
    return POE_OK;
}

static poe_status map_file(const char *path, poe_safetensors *file)
{
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info)) {
        poe_error("cannot read %s: %s", path, strerror(errno));
        if (fd >= 0)
            close(fd);
        return POE_BAD_INPUT;
    }
    void *map = MAP_FAILED;
    bool plausible = S_ISREG(info.st_mode) && info.st_size >= 8;
    if (plausible)
        map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    int error = errno;
    close(fd);
    if (!plausible)
        return refuse(path, "it is no file of at least 8 bytes");
    if (map == MAP_FAILED) {
        poe_error("cannot map %s: %s", path, strerror(error));
        return POE_FAILED;
    }
    file->map = map;
    file->size = (size_t)info.st_size;
    return POE_OK;
}

static poe_status read_header(const char *path, poe_safetensors *file)
{
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | file->map[i];
    if (length > file->size - 8)
        return refuse(path, "its header should have %llu bytes, the file has %zu", (unsigned long long)length,
                      file->size);
    file->data = file->map + 8 + length;
    file->data_size = file->size - 8 - length;
    json_error_t error;
    json_t *header = json_loadb((const char *)file->map + 8, length, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(header)) {
        json_decref(header);
        return refuse(path, "its header is no JSON object (%s)", header ? "another value" : error.text);
    }
    poe_status status = parse_header(path, header, file);
    json_decref(header);
    return status;
}

poe_status poe_safetensors_open(const char *path, poe_safetensors **file)
{
    poe_safetensors *f = calloc(1, sizeof(*f));
    if (!f) {
        poe_error("not enough memory to open %s", path);
        return POE_FAILED;
    }
    poe_status status = map_file(path, f);
    if (!status)
        status = read_header(path, f);
    if (status) {
        poe_safetensors_close(f);
        return status;
    }
    *file = f;
    return POE_OK;
}

void poe_safetensors_close(poe_safetensors *file)
{
    if (!file)
        return;
    if (file->map)
        munmap(file->map, file->size);
    free(file->entries);
    free(file);
}

size_t poe_safetensors_count(const poe_safetensors *file)
{
    return file->count;
}

const poe_safetensor *poe_safetensors_at(const poe_safetensors *file, size_t i)
{
    return &file->entries[i].tensor;
}

const poe_safetensor *poe_safetensors_find(const poe_safetensors *file, const char *name)
{
    for (size_t i = 0; i < file->count; i++) {
        if (strcmp(file->entries[i].tensor.name, name) == 0)
            return &file->entries[i].tensor;
    }
    return NULL;
}

void poe_safetensors_read(const poe_safetensors *file, const poe_safetensor *tensor, size_t first, size_t n,
                          float *values)
{
    size_t width = dtype_size(tensor->dtype);
    const unsigned char *from = file->data + ((const entry *)tensor)->begin + first * width;
    if (tensor->dtype == POE_F32) {
        memcpy(values, from, n * width);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)from[2 * i + 1] << 24 | (uint32_t)from[2 * i] << 16;
        memcpy(&values[i], &bits, 4);
    }
}

/* --- writing ---------------------------------------------------------------------------------------------------- */

struct poe_safetensors_writer {
    char path[POE_PATH_MAX], temporary[POE_PATH_MAX];
    int fd;
    uint64_t data_begin, size;
    entry *entries;
    size_t count;
    poe_pieces pieces;
    bool failed;
    unsigned char half[1 << 16]; /* values on their way to bf16 */
};

static poe_status writer_failed(poe_safetensors_writer *writer, const char *what)
{
    poe_error("cannot %s %s: %s", what, writer->temporary, strerror(errno));
    writer->failed = true;
    return POE_FAILED;
}

static poe_status put(poe_safetensors_writer *writer, uint64_t offset, const void *data, size_t bytes)
{
    if (bytes == 0)
        return POE_OK;
    if (poe_pieces_add(&writer->pieces, offset, data, bytes)) {
        writer->failed = true;
        return POE_FAILED;
    }
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pwrite(writer->fd, (const char *)data + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return writer_failed(writer, "write");
        done += (size_t)n;
    }
    return POE_OK;
}

/* The metadata's "format" is what readers made for PyTorch models ask for. */
static char *build_header(const poe_safetensors_writer *writer)
{
    json_t *header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    for (size_t i = 0; header && i < writer->count; i++) {
        const entry *e = &writer->entries[i];
        json_t *shape = e->tensor.ndim == 2
                            ? json_pack("[I, I]", (json_int_t)e->tensor.shape[0], (json_int_t)e->tensor.shape[1])
                            : json_pack("[I]", (json_int_t)e->tensor.shape[0]);
        json_t *row = json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtype_name(e->tensor.dtype), "shape", shape,
                                "data_offsets", (json_int_t)e->begin, (json_int_t)e->end);
        if (json_object_set_new(header, e->tensor.name, row)) {
            json_decref(header);
            header = NULL;
        }
    }
    char *text = header ? json_dumps(header, JSON_COMPACT) : NULL;
    json_decref(header);
    return text;
}

/* Length, JSON, and spaces, so that the data is aligned to 8 bytes. */
static poe_status write_header(poe_safetensors_writer *writer)
{
    char *text = build_header(writer);
    size_t length = text ? strlen(text) : 0, padded = (length + 7) / 8 * 8;
    unsigned char *bytes = malloc(8 + padded + 1);
    if (!text || !bytes) {
        free(text);
        free(bytes);
        errno = ENOMEM;
        return writer_failed(writer, "write");
    }
    for (int i = 0; i < 8; i++)
        bytes[i] = (unsigned char)((uint64_t)padded >> 8 * i);
    memcpy(bytes + 8, text, length);
    memset(bytes + 8 + length, ' ', padded - length);
    writer->data_begin = 8 + padded;
    writer->size += writer->data_begin;
    poe_status status = put(writer, 0, bytes, 8 + padded);
    free(text);
    free(bytes);
    return status;
}

poe_status poe_safetensors_writer_create(const char *path, const poe_safetensor *tensors, size_t count,
                                         poe_safetensors_writer **writer)
{
    poe_safetensors_writer *w = calloc(1, sizeof(*w));
    entry *entries = calloc(count + 1, sizeof(*entries));
    if (!w || !entries) {
        poe_error("not enough memory to write %s", path);
        free(w);
        free(entries);
        return POE_FAILED;
    }
    w->entries = entries;
    w->count = count;
    for (size_t i = 0; i < count; i++) {
        uint64_t bytes = elements(&tensors[i]) * dtype_size(tensors[i].dtype);
        entries[i] = (entry){tensors[i], w->size, w->size + bytes};
        w->size += bytes;
    }
    w->fd = -1;
    poe_status status = poe_path(w->path, "%s", path);
    if (!status)
        status = poe_path(w->temporary, "%s.tmp", path);
    if (!status) {
        poe_temporary_register(w->temporary);
        w->fd = open(w->temporary, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        status = w->fd < 0 ? writer_failed(w, "create") : write_header(w);
    }
    if (status) {
        poe_safetensors_writer_discard(w);
        return status;
    }
    *writer = w;
    return POE_OK;
}

static poe_status put_bf16(poe_safetensors_writer *writer, uint64_t offset, size_t n, const float *values)
{
    poe_status status = POE_OK;
    for (size_t done = 0; done < n && !status;) {
        size_t m = n - done < sizeof(writer->half) / 2 ? n - done : sizeof(writer->half) / 2;
        for (size_t i = 0; i < m; i++) {
            uint32_t half = poe_bf16_bits(values[done + i]);
            writer->half[2 * i] = (unsigned char)half;
            writer->half[2 * i + 1] = (unsigned char)(half >> 8);
        }
        status = put(writer, offset + 2 * done, writer->half, 2 * m);
        done += m;
    }
    return status;
}

poe_status poe_safetensors_writer_write(poe_safetensors_writer *writer, const char *name, size_t first, size_t n,
                                        const float *values)
{
    const entry *e = NULL;
    for (size_t i = 0; i < writer->count && !e; i++) {
        if (strcmp(writer->entries[i].tensor.name, name) == 0)
            e = &writer->entries[i];
    }
    if (!e || first > elements(&e->tensor) || n > elements(&e->tensor) - first) {
        poe_error("%s has no place for %zu values from %zu of tensor %s", writer->path, n, first, name);
        writer->failed = true;
        return POE_FAILED;
    }
    uint64_t offset = writer->data_begin + e->begin + first * dtype_size(e->tensor.dtype);
    return e->tensor.dtype == POE_F32 ? put(writer, offset, values, 4 * n) : put_bf16(writer, offset, n, values);
}

/* Every byte of the file written exactly once, and found on the disk. */
static poe_status verify(poe_safetensors_writer *writer)
{
    poe_status status = poe_pieces_check(&writer->pieces, writer->fd, writer->temporary);
    uint64_t end = 0;
    for (size_t i = 0; i < writer->pieces.count && writer->pieces.at[i].begin == end; i++)
        end = writer->pieces.at[i].end;
    if (status || end == writer->size)
        return status;
    poe_error("%s was not written: its bytes from %llu on are missing or were given twice", writer->path,
              (unsigned long long)end);
    return POE_FAILED;
}

poe_status poe_safetensors_writer_finish(poe_safetensors_writer *writer)
{
    poe_status status = writer->failed ? POE_FAILED : verify(writer);
    if (!status && close(writer->fd))
        status = writer_failed(writer, "close");
    if (!status) {
        writer->fd = -1;
        status = poe_replace_file(writer->temporary, writer->path);
    }
    poe_safetensors_writer_discard(writer);
    return status;
}

/* After a successful rename there is nothing left under the temporary name, and unlink finds nothing. */
void poe_safetensors_writer_discard(poe_safetensors_writer *writer)
{
    if (!writer)
        return;
    if (writer->fd >= 0)
        close(writer->fd);
    unlink(writer->temporary);
    poe_temporary_forget(writer->temporary);
    free(writer->entries);
    free(writer->pieces.at);
    free(writer);
}
