/* SPDX-License-Identifier: MIT */
#include "src/h5file.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/crc32c.h"
#include "src/files.h"
#include "src/log.h"
#include "src/pieces.h"

struct poe_h5 {
    hid_t id;
    poe_status status; /* the first failure */
    bool writing;
    poe_pieces pieces; /* the arrays written */
    char path[POE_PATH_MAX];
};

/* What the library must be told once, and what every file is opened and every object made with. */
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP; /* a visitor may read */
static bool started;
static hid_t access_list, dataset_list, group_list, link_list;

static bool start(void)
{
    if (H5dont_atexit() < 0 || H5open() < 0) /* its clean-up at exit crashes after a failed close */
        return false;
    access_list = H5Pcreate(H5P_FILE_ACCESS);
    dataset_list = H5Pcreate(H5P_DATASET_CREATE);
    group_list = H5Pcreate(H5P_GROUP_CREATE);
    link_list = H5Pcreate(H5P_LINK_CREATE);
    /* No locks: network file systems lack them, and our temporary names have one writer. No times: equal contents
     * give equal files. */
    return H5Pset_fclose_degree(access_list, H5F_CLOSE_STRONG) >= 0 && H5Pset_file_locking(access_list, 0, 1) >= 0 &&
           H5Pset_obj_track_times(dataset_list, 0) >= 0 && H5Pset_obj_track_times(group_list, 0) >= 0 &&
           H5Pset_create_intermediate_group(link_list, 1) >= 0;
}

static bool enter(void)
{
    pthread_mutex_lock(&lock);
    started = started || start();
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL); /* a thread's own setting: we say what failed, not its stack of lines */
    errno = 0;                             /* of a system call within the library, if one is what fails */
    return started;
}

static void leave(void)
{
    int reason = errno;
    pthread_mutex_unlock(&lock);
    errno = reason;
}

static bool shut(hid_t id, herr_t (*close)(hid_t))
{
    return id < 0 || close(id) >= 0;
}

static const char *reason(void)
{
    return errno ? strerror(errno) : "HDF5 reports a failure";
}

static poe_status failed(poe_h5 *file, const char *what, const char *object)
{
    poe_error("cannot write %s %s to %s: %s", what, object, file->path, reason());
    return file->status = POE_FAILED;
}

static poe_status refuse(poe_h5 *file, const char *object, const char *why)
{
    poe_error("%s: %s %s", file->path, object, why);
    return file->status = POE_BAD_INPUT;
}

static poe_status open_file(const char *path, bool create, poe_h5 **file)
{
    poe_h5 *f = calloc(1, sizeof(*f));
    if (!f) {
        poe_error("not enough memory to open %s", path);
        return POE_FAILED;
    }
    poe_status status = poe_path(f->path, "%s", path);
    if (!status) {
        f->id = -1;
        f->writing = create;
        if (enter())
            f->id = create ? H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, access_list)
                           : H5Fopen(path, H5F_ACC_RDONLY, access_list);
        leave();
        if (f->id < 0) {
            poe_error(create ? "cannot create %s: %s" : "cannot open %s as an HDF5 file: %s", path, reason());
            status = create ? POE_FAILED : POE_BAD_INPUT;
        }
    }
    if (status) {
        free(f);
        return status;
    }
    *file = f;
    return POE_OK;
}

poe_status poe_h5_create(const char *path, poe_h5 **file)
{
    return open_file(path, true, file);
}

poe_status poe_h5_open(const char *path, poe_h5 **file)
{
    return open_file(path, false, file);
}

static poe_status read_back(poe_h5 *file)
{
    int fd = open(file->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        poe_error("cannot read %s back: %s", file->path, strerror(errno));
        return POE_FAILED;
    }
    poe_status status = poe_pieces_check(&file->pieces, fd, file->path);
    close(fd);
    return status;
}

poe_status poe_h5_close(poe_h5 *file)
{
    enter();
    bool ok = shut(file->id, H5Fclose);
    leave();
    if (!ok && !file->status)
        failed(file, "the end of", "the data");
    poe_status status = file->status;
    if (!status && file->writing)
        status = read_back(file);
    free(file->pieces.at);
    free(file);
    return status;
}

static bool put_attribute(hid_t object, const char *name, hid_t disk_type, hid_t memory_type, const void *value)
{
    hid_t space = H5Screate(H5S_SCALAR);
    hid_t attribute = H5Acreate2(object, name, disk_type, space, H5P_DEFAULT, H5P_DEFAULT);
    bool ok = attribute >= 0 && H5Awrite(attribute, memory_type, value) >= 0;
    ok &= shut(attribute, H5Aclose);
    ok &= shut(space, H5Sclose);
    return ok;
}

static bool get_integer(hid_t object, const char *name, int64_t *value)
{
    hid_t attribute = H5Aopen(object, name, H5P_DEFAULT);
    hid_t type = H5Aget_type(attribute), space = H5Aget_space(attribute);
    bool ok = type >= 0 && H5Tget_class(type) == H5T_INTEGER && H5Sget_simple_extent_npoints(space) == 1 &&
              H5Aread(attribute, H5T_NATIVE_INT64, value) >= 0;
    ok &= shut(space, H5Sclose);
    ok &= shut(type, H5Tclose);
    ok &= shut(attribute, H5Aclose);
    return ok;
}

static size_t count_of(int ndim, const size_t *shape)
{
    size_t n = 1;
    for (int i = 0; i < ndim; i++)
        n *= shape[i];
    return n;
}

poe_status poe_h5_write(poe_h5 *file, const char *path, int ndim, const size_t *shape, const float *values)
{
    hsize_t extents[POE_H5_DIMENSIONS] = {0};
    assert(ndim >= 1 && ndim <= POE_H5_DIMENSIONS);
    if (file->status)
        return file->status;
    for (int i = 0; i < ndim; i++)
        extents[i] = shape[i];
    size_t bytes = count_of(ndim, shape) * sizeof(float);
    uint32_t crc = poe_crc32c(0, values, bytes);
    enter();
    hid_t space = H5Screate_simple(ndim, extents, NULL);
    hid_t dataset = H5Dcreate2(file->id, path, H5T_IEEE_F32LE, space, link_list, dataset_list, H5P_DEFAULT);
    bool ok = dataset >= 0 && H5Dwrite(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0 &&
              put_attribute(dataset, "crc32c", H5T_STD_U32LE, H5T_NATIVE_UINT32, &crc);
    haddr_t place = ok ? H5Dget_offset(dataset) : HADDR_UNDEF;
    ok &= shut(dataset, H5Dclose);
    ok &= shut(space, H5Sclose);
    leave();
    if (!ok)
        return failed(file, "dataset", path);
    return file->status = bytes ? poe_pieces_add(&file->pieces, place, values, bytes) : POE_OK;
}

/* The shape of an open dataset of floats; false when it is none of at most POE_H5_DIMENSIONS dimensions. */
static bool get_shape(hid_t dataset, int *ndim, size_t *shape)
{
    hsize_t extents[POE_H5_DIMENSIONS] = {0};
    hid_t space = H5Dget_space(dataset), type = H5Dget_type(dataset);
    int n = H5Sget_simple_extent_ndims(space);
    bool ok = n >= 1 && n <= POE_H5_DIMENSIONS && H5Tequal(type, H5T_IEEE_F32LE) > 0 &&
              H5Sget_simple_extent_dims(space, extents, NULL) == n;
    *ndim = n;
    for (int i = 0; ok && i < n; i++)
        shape[i] = extents[i];
    ok &= shut(type, H5Tclose);
    ok &= shut(space, H5Sclose);
    return ok;
}

/* NULL, or what is wrong. */
static const char *read_values(hid_t dataset, int ndim, const size_t *shape, float *values)
{
    int found_ndim;
    size_t found[POE_H5_DIMENSIONS];
    int64_t crc;
    if (dataset < 0)
        return "is not there";
    if (!get_shape(dataset, &found_ndim, found))
        return "is no array of 32-bit floats";
    if (found_ndim != ndim || memcmp(found, shape, (size_t)ndim * sizeof(*shape)) != 0)
        return "has another shape than the model needs";
    if (H5Dread(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) < 0)
        return "cannot be read";
    if (!get_integer(dataset, "crc32c", &crc))
        return "has no checksum";
    if (crc != poe_crc32c(0, values, count_of(ndim, shape) * sizeof(float)))
        return "does not have the checksum that was stored with it";
    return NULL;
}

poe_status poe_h5_read(poe_h5 *file, const char *path, int ndim, const size_t *shape, float *values)
{
    if (file->status)
        return file->status;
    enter();
    hid_t dataset = H5Dopen2(file->id, path, H5P_DEFAULT);
    const char *why = read_values(dataset, ndim, shape, values);
    shut(dataset, H5Dclose);
    leave();
    return why ? refuse(file, path, why) : POE_OK;
}

/* The group or dataset at `path`; where nothing is yet, a new group. */
static hid_t object_at(poe_h5 *file, const char *path)
{
    hid_t object = H5Oopen(file->id, path, H5P_DEFAULT);
    return object >= 0 ? object : H5Gcreate2(file->id, path, link_list, group_list, H5P_DEFAULT);
}

poe_status poe_h5_write_integer(poe_h5 *file, const char *path, const char *attribute, int64_t value)
{
    if (file->status)
        return file->status;
    enter();
    hid_t object = object_at(file, path);
    bool ok = object >= 0 && put_attribute(object, attribute, H5T_STD_I64LE, H5T_NATIVE_INT64, &value);
    ok &= shut(object, H5Oclose);
    leave();
    return ok ? POE_OK : failed(file, "attribute", attribute);
}

poe_status poe_h5_read_integer(poe_h5 *file, const char *path, const char *attribute, int64_t *value)
{
    if (file->status)
        return file->status;
    enter();
    hid_t object = H5Oopen(file->id, path, H5P_DEFAULT);
    bool ok = object >= 0 && get_integer(object, attribute, value);
    ok &= shut(object, H5Oclose);
    leave();
    if (ok)
        return POE_OK;
    poe_error("%s: %s has no whole number called %s", file->path, path, attribute);
    return file->status = POE_BAD_INPUT;
}

poe_status poe_h5_write_text(poe_h5 *file, const char *path, const char *attribute, const char *value)
{
    if (file->status)
        return file->status;
    enter();
    hid_t object = object_at(file, path), type = H5Tcopy(H5T_C_S1);
    bool ok = object >= 0 && H5Tset_size(type, strlen(value) + 1) >= 0 && H5Tset_cset(type, H5T_CSET_UTF8) >= 0 &&
              put_attribute(object, attribute, type, type, value);
    ok &= shut(type, H5Tclose);
    ok &= shut(object, H5Oclose);
    leave();
    return ok ? POE_OK : failed(file, "attribute", attribute);
}

typedef struct visitor {
    poe_h5_visit visit;
    void *arg;
} visitor;

static herr_t visit_object(hid_t root, const char *name, const H5O_info_t *info, void *arg)
{
    const visitor *v = arg;
    char path[POE_PATH_MAX];
    int ndim;
    size_t shape[POE_H5_DIMENSIONS];
    if (info->type != H5O_TYPE_DATASET)
        return 0;
    hid_t dataset = H5Dopen2(root, name, H5P_DEFAULT);
    bool ok = dataset >= 0 && get_shape(dataset, &ndim, shape) && !poe_path(path, "/%s", name);
    ok &= shut(dataset, H5Dclose);
    if (ok)
        v->visit(v->arg, path, ndim, shape);
    return ok ? 0 : -1;
}

poe_status poe_h5_each(poe_h5 *file, poe_h5_visit visit, void *arg)
{
    visitor v = {visit, arg};
    if (file->status)
        return file->status;
    enter();
    bool ok = H5Ovisit(file->id, H5_INDEX_NAME, H5_ITER_INC, visit_object, &v) >= 0;
    leave();
    return ok ? POE_OK : refuse(file, "its list of arrays", "cannot be read");
}
