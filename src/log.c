/* SPDX-License-Identifier: MIT */
#include "src/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/status.h"

struct poe_log {
    pthread_mutex_t lock;
    int rank;
    int size;
    int holds;
    bool has_held;
    char held[2048];
};

static _Thread_local poe_log *current;

int poe_exit_status(poe_status status)
{
    switch (status) {
    case POE_OK:
    case POE_END:
        return 0;
    case POE_BAD_INPUT:
        return 2;
    case POE_INTERRUPTED:
        return 130;
    default:
        return 1;
    }
}

poe_log *poe_log_create(int rank, int size)
{
    poe_log *log = calloc(1, sizeof(*log));
    if (!log)
        return NULL;
    pthread_mutex_init(&log->lock, NULL);
    log->rank = rank;
    log->size = size;
    return log;
}

void poe_log_destroy(poe_log *log)
{
    if (!log)
        return;
    if (current == log)
        current = NULL;
    pthread_mutex_destroy(&log->lock);
    free(log);
}

void poe_log_attach(poe_log *log)
{
    current = log;
}

poe_log *poe_log_current(void)
{
    return current;
}

/* One write per line, so that lines of different ranks never mix. */
static void print_line(const poe_log *log, const char *text)
{
    char line[2304];
    if (log && log->size > 1)
        snprintf(line, sizeof(line), "poe-pipe: rank %d: %s\n", log->rank, text);
    else
        snprintf(line, sizeof(line), "poe-pipe: %s\n", text);
    fputs(line, stderr);
}

void poe_log_hold(void)
{
    if (!current)
        return;
    pthread_mutex_lock(&current->lock);
    current->holds++;
    pthread_mutex_unlock(&current->lock);
}

void poe_log_settle(bool print)
{
    if (!current)
        return;
    pthread_mutex_lock(&current->lock);
    if (current->has_held && print)
        print_line(current, current->held);
    current->has_held = false;
    current->holds -= current->holds > 0;
    pthread_mutex_unlock(&current->lock);
}

void poe_log_drop(void)
{
    if (!current)
        return;
    pthread_mutex_lock(&current->lock);
    current->has_held = false;
    pthread_mutex_unlock(&current->lock);
}

void poe_error(const char *format, ...)
{
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (!current) {
        print_line(NULL, text);
        return;
    }
    pthread_mutex_lock(&current->lock);
    if (!current->holds) {
        print_line(current, text);
    } else if (!current->has_held) {
        strcpy(current->held, text);
        current->has_held = true;
    }
    pthread_mutex_unlock(&current->lock);
}

static void print_formatted(const char *prefix, const char *format, va_list args)
{
    char text[2048];
    int used = snprintf(text, sizeof(text), "%s", prefix);
    vsnprintf(text + used, sizeof(text) - (size_t)used, format, args);
    print_line(current, text);
}

void poe_warn(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_formatted("warning: ", format, args);
    va_end(args);
}

void poe_info(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_formatted("", format, args);
    va_end(args);
}
