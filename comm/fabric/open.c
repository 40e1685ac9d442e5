/* SPDX-License-Identifier: MIT
 * How a rank finds a provider, an address and a port, and the ranks each other. */
#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include "comm/fabric/impl.h"
#include "src/log.h"

enum { API = FI_VERSION(1, 14), LIST_BYTES = 256 };

void poe_fabric_address_text(const void *address, size_t bytes, char text[64])
{
    struct sockaddr_storage s = {0};
    char host[INET6_ADDRSTRLEN] = "?";
    if (address)
        memcpy(&s, address, bytes < sizeof(s) ? bytes : sizeof(s));
    const struct sockaddr_in *four = (const struct sockaddr_in *)&s;
    const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)&s;
    if (s.ss_family == AF_INET) {
        inet_ntop(AF_INET, &four->sin_addr, host, sizeof(host));
        snprintf(text, 64, "%s:%d", host, ntohs(four->sin_port));
    } else if (s.ss_family == AF_INET6) {
        inet_ntop(AF_INET6, &six->sin6_addr, host, sizeof(host));
        snprintf(text, 64, "[%s]:%d", host, ntohs(six->sin6_port));
    } else {
        snprintf(text, 64, "an address of another kind");
    }
}

/* "a, b, c", each once. */
static void list(char text[LIST_BYTES], const char *word)
{
    size_t used = strlen(text), length = strlen(word);
    for (const char *at = text; (at = strstr(at, word)); at += length)
        if ((at == text || at[-1] == ' ') && (at[length] == 0 || at[length] == ','))
            return;
    if (used + length + 3 < LIST_BYTES)
        snprintf(text + used, LIST_BYTES - used, "%s%s", used ? ", " : "", word);
}

/* --- providers ---------------------------------------------------------------------------------------------------- */
static struct fi_info *hints_for(const poe_libfabric *library, const char *provider)
{
    struct fi_info *hints = library->dupinfo(NULL);
    if (!hints)
        return NULL;
    hints->caps = FI_MSG;
    hints->ep_attr->type = FI_EP_MSG;
    hints->tx_attr->inject_size = POE_UNIT_HEADER;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->data_progress = hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
    if (provider)
        hints->fabric_attr->prov_name = strdup(provider);
    return hints;
}

static poe_status refuse_provider(const poe_libfabric *library, const char *provider)
{
    char names[LIST_BYTES] = "";
    struct fi_info *hints = hints_for(library, NULL), *found = NULL;
    library->getinfo(API, NULL, NULL, 0, hints, &found);
    for (const struct fi_info *i = found; i; i = i->next)
        list(names, i->fabric_attr->prov_name);
    library->freeinfo(found);
    library->freeinfo(hints);
    if (names[0])
        poe_error("--fabric-provider: found \"%s\", allowed is what libfabric offers here: %s", provider, names);
    else
        poe_error("--transport fabric: libfabric has no provider of connected endpoints on this machine; give mpi");
    return POE_BAD_INPUT;
}

/* The provider's description of itself at this address, or NULL. */
static struct fi_info *offer_at(const poe_libfabric *library, const char *provider, const struct sockaddr *address)
{
    size_t bytes = address->sa_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
    struct fi_info *hints = hints_for(library, provider), *found = NULL;
    if (!hints)
        return NULL;
    hints->addr_format = address->sa_family == AF_INET ? FI_SOCKADDR_IN : FI_SOCKADDR_IN6;
    hints->src_addr = malloc(bytes);
    hints->src_addrlen = hints->src_addr ? bytes : 0;
    if (hints->src_addr)
        memcpy(hints->src_addr, address, bytes);
    if (library->getinfo(API, NULL, NULL, 0, hints, &found) != 0)
        found = NULL;
    library->freeinfo(hints);
    return found;
}

/* --- interfaces --------------------------------------------------------------------------------------------------- */
static bool is_usable(const struct ifaddrs *i, bool loopback)
{
    if (!i->ifa_addr || !(i->ifa_flags & IFF_UP) || !(i->ifa_flags & IFF_LOOPBACK) == loopback)
        return false;
    const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)(void *)i->ifa_addr;
    return i->ifa_addr->sa_family == AF_INET ||
           (i->ifa_addr->sa_family == AF_INET6 && !IN6_IS_ADDR_LINKLOCAL(&six->sin6_addr));
}

/* The first that the provider works at, IPv4 before IPv6. `name`: NULL for any. */
static struct fi_info *try_interfaces(const poe_libfabric *library, const struct ifaddrs *all, const char *name,
                                      bool loopback, const char *provider)
{
    static const int families[] = {AF_INET, AF_INET6};
    for (int f = 0; f < 2; f++)
        for (const struct ifaddrs *i = all; i; i = i->ifa_next) {
            if (!is_usable(i, loopback) || i->ifa_addr->sa_family != families[f] || (name && strcmp(name, i->ifa_name)))
                continue;
            struct fi_info *found = offer_at(library, provider, i->ifa_addr);
            if (found)
                return found;
        }
    return NULL;
}

static poe_status refuse_interface(const struct ifaddrs *all, const char *name, const char *provider)
{
    char names[LIST_BYTES] = "";
    for (const struct ifaddrs *i = all; i; i = i->ifa_next)
        if (is_usable(i, true) || is_usable(i, false))
            list(names, i->ifa_name);
    if (name)
        poe_error("--interface: found \"%s\", allowed are the network interfaces of this host that are up and serve "
                  "%s: %s", name, provider, names);
    else
        poe_error("--transport fabric: provider %s works at no network interface of this host: %s", provider, names);
    return POE_BAD_INPUT;
}

/* Between ranks of one host nothing leaves it, where the provider can do that. */
static poe_status choose_address(const poe_libfabric *library, const poe_fabric_settings *settings, bool alone,
                                 struct fi_info **info)
{
    const char *provider = settings->provider && settings->provider[0] ? settings->provider : "tcp";
    const char *name = settings->interface && settings->interface[0] ? settings->interface : NULL;
    struct ifaddrs *all = NULL;
    struct fi_info *any = NULL, *hints = hints_for(library, provider);
    int result = hints ? library->getinfo(API, NULL, NULL, 0, hints, &any) : -FI_ENOMEM;
    library->freeinfo(hints);
    if (result != 0)
        return refuse_provider(library, provider);
    library->freeinfo(any);
    if (getifaddrs(&all) != 0) {
        poe_error("--transport fabric: the network interfaces of this host cannot be listed: %s", strerror(errno));
        return POE_FAILED;
    }
    struct fi_info *found = NULL;
    if (name || alone)
        found = try_interfaces(library, all, name, true, provider);
    if (!found)
        found = try_interfaces(library, all, name, false, provider);
    poe_status status = found ? POE_OK : refuse_interface(all, name, provider);
    freeifaddrs(all);
    *info = found;
    return status;
}

/* --- opening ------------------------------------------------------------------------------------------------------ */
static void set_port(struct fi_info *info, int port)
{
    if (info->addr_format == FI_SOCKADDR_IN)
        ((struct sockaddr_in *)info->src_addr)->sin_port = htons((uint16_t)port);
    else
        ((struct sockaddr_in6 *)info->src_addr)->sin6_port = htons((uint16_t)port);
}

static int listen_at(fabric *f, int port)
{
    set_port(f->info, port);
    int result = fi_passive_ep(f->fid, f->info, &f->door, NULL);
    if (result == 0)
        result = fi_pep_bind(f->door, &f->eq->fid, 0);
    if (result == 0)
        result = fi_listen(f->door);
    if (result != 0 && f->door) {
        fi_close(&f->door->fid);
        f->door = NULL;
    }
    return result;
}

static poe_status open_door(fabric *f, const poe_fabric_settings *settings, int rank)
{
    int n = settings->port_low ? settings->port_high - settings->port_low + 1 : 1, result = 0;
    for (int i = 0; i < n; i++) {
        result = listen_at(f, settings->port_low ? settings->port_low + (rank + i) % n : 0);
        if (result == 0) {
            size_t bytes = NAME_BYTES;
            set_port(f->info, 0);
            result = fi_getname(&f->door->fid, f->name.address, &bytes);
            f->name.bytes = (uint32_t)bytes;
            break;
        }
    }
    if (result == 0)
        return POE_OK;
    if (settings->port_low)
        poe_error("--port-range %d-%d: rank %d finds no free port there (%s); give a larger range, one port for each "
                  "rank of a host", settings->port_low, settings->port_high, rank, f->library->strerror(-result));
    else
        poe_error("--transport fabric: rank %d cannot listen for the others: %s", rank, f->library->strerror(-result));
    return POE_BAD_INPUT;
}

static int open_objects(fabric *f)
{
    struct fi_eq_attr eq = {.wait_obj = FI_WAIT_FD};
    struct fi_cq_attr cq = {.wait_obj = FI_WAIT_FD, .format = FI_CQ_FORMAT_MSG, .size = 1024};
    int result = f->library->fabric(f->info->fabric_attr, &f->fid, NULL);
    if (result == 0)
        result = fi_eq_open(f->fid, &eq, &f->eq, NULL);
    if (result == 0)
        result = fi_domain(f->fid, f->info, &f->domain, NULL);
    if (result == 0)
        result = fi_cq_open(f->domain, &cq, &f->cq, NULL);
    if (result == 0)
        result = fi_control(&f->eq->fid, FI_GETWAIT, &f->eq_fd);
    if (result == 0)
        result = fi_control(&f->cq->fid, FI_GETWAIT, &f->cq_fd);
    if (result == 0 && (f->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) < 0)
        result = -errno;
    return result;
}

poe_status poe_fabric_listen(const poe_fabric_settings *settings, bool alone, int rank, fabric **fabric_out)
{
    fabric *f = calloc(1, sizeof(*f));
    if (!f) {
        poe_error("out of memory for the connections between ranks");
        return POE_FAILED;
    }
    f->wake_fd = -1;
    f->library = poe_libfabric_load();
    poe_status status = f->library ? choose_address(f->library, settings, alone, &f->info) : POE_BAD_INPUT;
    if (status == POE_OK) {
        f->registers = settings->registers || (f->info->domain_attr->mr_mode & FI_MR_LOCAL);
        f->parts = f->info->tx_attr->iov_limit < MAX_PARTS ? (int)f->info->tx_attr->iov_limit : MAX_PARTS;
        int result = open_objects(f);
        if (result != 0) {
            poe_error("--transport fabric: libfabric's provider %s cannot be opened: %s",
                      f->info->fabric_attr->prov_name, f->library->strerror(-result));
            status = POE_FAILED;
        }
    }
    if (status == POE_OK)
        status = open_door(f, settings, rank);
    if (status != POE_OK) {
        poe_fabric_close(f);
        return status;
    }
    *fabric_out = f;
    return POE_OK;
}

static void close_fid(struct fid *fid)
{
    if (fid)
        fi_close(fid);
}

static void free_lists(fabric *f)
{
    for (line *l; (l = f->closed);) {
        f->closed = l->next;
        free(l);
    }
    for (token *t; (t = f->tokens);) {
        f->tokens = t->next;
        free(t);
    }
    for (transfer *t; (t = f->transfers);) {
        f->transfers = t->next;
        free(t);
    }
}

void poe_fabric_close(fabric *f)
{
    if (!f)
        return;
    for (int rank = 0; rank < f->base.size; rank++)
        if (f->peers && f->peers[rank])
            poe_peer_free(f->peers[rank]);
    close_fid(f->door ? &f->door->fid : NULL);
    close_fid(f->cq ? &f->cq->fid : NULL);
    close_fid(f->domain ? &f->domain->fid : NULL);
    close_fid(f->eq ? &f->eq->fid : NULL);
    close_fid(f->fid ? &f->fid->fid : NULL);
    free_lists(f);
    if (f->wake_fd >= 0)
        close(f->wake_fd);
    if (f->info)
        f->library->freeinfo(f->info);
    free(f->dump);
    free(f->peers);
    free(f->names);
    free(f->directory);
    free(f);
}

/* --- meeting ------------------------------------------------------------------------------------------------------ */
static poe_status make_secret(int rank, unsigned char secret[POE_SECRET_BYTES])
{
    if (rank != 0 || getrandom(secret, POE_SECRET_BYTES, 0) == POE_SECRET_BYTES)
        return POE_OK;
    poe_error("--transport fabric: there are no random numbers for the run's secret: %s", strerror(errno));
    return POE_FAILED;
}

/* Who is not of the job yet has joined a job of nobody. */
static poe_status join(fabric *f, int rank, int members, const fabric_name *names, const unsigned char *secret)
{
    bool belongs = rank < members;
    return poe_fabric_join(f, belongs ? rank : 0, belongs ? members : 0, names, secret);
}

poe_status poe_fabric_create_for(poe_comm *over, const poe_fabric_settings *settings, int members,
                                 poe_transport **transport)
{
    int rank = poe_comm_rank(over), size = poe_comm_size(over);
    unsigned char secret[POE_SECRET_BYTES];
    fabric *f = NULL;
    fabric_name *names = calloc((size_t)size, sizeof(*names));
    poe_status status = names ? make_secret(rank, secret) : POE_FAILED;
    if (!names)
        poe_error("out of memory for the addresses of %d ranks", size);
    if (status == POE_OK)
        status = poe_fabric_listen(settings, poe_comm_host_ranks(over) == size, rank, &f);
    status = poe_comm_agree(over, status);
    if (status == POE_OK)
        status = poe_comm_broadcast(over, 0, secret, sizeof(secret));
    if (status == POE_OK)
        status = poe_comm_gather(over, &f->name, names, sizeof(*names));
    if (status == POE_OK)
        status = poe_comm_agree(over, join(f, rank, members, names, secret));
    if (status != POE_OK) {
        free(names);
        poe_fabric_close(f);
        return status;
    }
    f->directory = names;
    f->n_directory = size;
    f->base.host_ranks = poe_comm_host_ranks(over);
    *transport = &f->base;
    return POE_OK;
}

poe_status poe_fabric_create(poe_comm *over, const poe_fabric_settings *settings, poe_transport **transport)
{
    return poe_fabric_create_for(over, settings, poe_comm_size(over), transport);
}
