/* What a host relies on: codes, messages, NULL, every method, host pointers, files, cancelling from another thread.
 *
 *     check DATA SCRATCH [LARGE_1 LARGE_2]
 *
 * DATA is tests/data, SCRATCH an empty folder. Without the large adapters, as under valgrind, the small ones are
 * cancelled, and without a limit of time. */
#include <loraweld.h>

#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHECK(condition)                                                                              \
    do {                                                                                              \
        if (!(condition)) {                                                                           \
            fprintf(stderr, "%s:%d: %s; the last error: %s\n", __FILE__, __LINE__, #condition,        \
                    loraweld_last_error());                                                           \
            exit(1);                                                                                  \
        }                                                                                             \
    } while (0)
#define OK(call) CHECK((call) == LORAWELD_STATUS_OK)
/* Refused with this code, in a message that has this in it. */
#define REFUSED(code, part, call)                                    \
    do {                                                             \
        CHECK((call) == LORAWELD_STATUS_##code);                     \
        CHECK(strstr(loraweld_last_error(), part));                  \
    } while (0)

static const char *data, *scratch;

/* Of four texts that take turns. */
static const char *path(const char *folder, const char *name) {
    static char paths[4][4096];
    static int next;
    next = (next + 1) % 4;
    snprintf(paths[next], sizeof paths[next], "%s/%s", folder, name);
    return paths[next];
}

static int files_in_scratch(void) {
    DIR *folder = opendir(scratch);
    CHECK(folder);
    int count = 0;
    for (struct dirent *entry; (entry = readdir(folder));) count += strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..");
    closedir(folder);
    return count;
}

static char *read_file(const char *name, size_t *size) {
    FILE *file = fopen(name, "rb");
    CHECK(file);
    CHECK(!fseek(file, 0, SEEK_END));
    *size = (size_t)ftell(file);
    rewind(file);
    char *bytes = malloc(*size + 1);
    CHECK(bytes && fread(bytes, 1, *size, file) == *size);
    bytes[*size] = 0;
    fclose(file);
    return bytes;
}

static int same_bytes(const char *x, const char *y) {
    size_t n, m;
    char *of_x = read_file(x, &n), *of_y = read_file(y, &m);
    int same = n == m && !memcmp(of_x, of_y, n);
    free(of_x);
    free(of_y);
    return same;
}

static LoraweldAdapter *open_adapter(const char *name) {
    LoraweldAdapter *adapter;
    OK(loraweld_adapter_open(name, &adapter));
    return adapter;
}

static void refusals(const LoraweldDevice *device, const LoraweldAdapter *const *pool) {
    CHECK(strlen(loraweld_version()) >= 5 && loraweld_version()[1] == '.');

    LoraweldDevice *no_device = (LoraweldDevice *)&no_device;
    REFUSED(DEVICE, "no adapter is named `no such chip`", loraweld_device_open("no such chip", NULL, 0, &no_device));
    CHECK(!no_device);
    REFUSED(INVALID, "precision: `f8`", loraweld_device_open("cpu", "f8", 0, &no_device));
    REFUSED(INVALID, "`device` is NULL", loraweld_device_open("cpu", NULL, 0, NULL));

    LoraweldAdapter *adapter = (LoraweldAdapter *)&adapter;
    REFUSED(IO, "no/such.safetensors", loraweld_adapter_open("no/such.safetensors", &adapter));
    CHECK(!adapter);
    REFUSED(INVALID, "`path` is NULL", loraweld_adapter_open(NULL, &adapter));
    REFUSED(INVALID, "`path` is not UTF-8", loraweld_adapter_open("caf\xe9.safetensors", &adapter));
    const char *damaged = path(scratch, "damaged.safetensors");
    FILE *file = fopen(damaged, "wb");
    CHECK(file && fputs("this is no header", file) >= 0 && !fclose(file));
    REFUSED(FILE, "damaged.safetensors", loraweld_adapter_open(damaged, &adapter));
    CHECK(!remove(damaged));

    LoraweldLayer layer;
    OK(loraweld_adapter_layer(pool[0], 0, &layer));
    CHECK(layer.rank > 0 && layer.input > 0 && layer.output > 0 && strlen(layer.name) > 0);
    REFUSED(INVALID, "`index` is 1000", loraweld_adapter_layer(pool[0], 1000, &layer));
    REFUSED(INVALID, "`layer` is NULL", loraweld_adapter_layer(pool[0], 0, NULL));
    REFUSED(INVALID, "`adapter` is NULL", loraweld_adapter_layer(NULL, 0, &layer));
    REFUSED(INVALID, "`adapter` is NULL", loraweld_adapter_save(NULL, path(scratch, "none"), NULL));
    LoraweldSaveOptions wrong = {.dtype = "f12"};
    REFUSED(INVALID, "dtype: `f12`", loraweld_adapter_save(pool[0], path(scratch, "none"), &wrong));
    wrong = (LoraweldSaveOptions){.format = "zip"};
    REFUSED(INVALID, "format: `zip`", loraweld_adapter_save(pool[0], path(scratch, "none"), &wrong));

    LoraweldMerged *merged = (LoraweldMerged *)&merged;
#define MERGE(method, options, pool, count) \
    loraweld_merge(device, method, options, pool, NULL, count, NULL, NULL, &merged)
    REFUSED(INVALID, "method: `magic`", MERGE("magic", NULL, pool, 2));
    CHECK(!merged);
    REFUSED(INVALID, "densty", MERGE("ties", "{\"densty\": 0.5}", pool, 2));
    REFUSED(INVALID, "density: 7", MERGE("ties", "{\"density\": 7}", pool, 2));
    REFUSED(INVALID, "options of ties", MERGE("ties", "density", pool, 2));
    REFUSED(INVALID, "ssr takes one", MERGE("ssr", NULL, pool, 2));
    REFUSED(INVALID, "`count` is 0", MERGE("linear", NULL, pool, 0));
    REFUSED(INVALID, "`adapters` is NULL", MERGE("linear", NULL, NULL, 2));
    const LoraweldAdapter *const holed[2] = {pool[0], NULL};
    REFUSED(INVALID, "`adapters[1]` is NULL", MERGE("linear", NULL, holed, 2));
    REFUSED(INVALID, "`device` is NULL", loraweld_merge(NULL, "linear", NULL, pool, NULL, 2, NULL, NULL, &merged));
    REFUSED(INVALID, "`merged` is NULL", loraweld_merge(device, "linear", NULL, pool, NULL, 2, NULL, NULL, NULL));
    REFUSED(INVALID, "`merged` is NULL", loraweld_merged_adapter(NULL, &adapter));
    REFUSED(INVALID, "`cancel` is NULL", loraweld_cancel_new(NULL));

    CHECK(!loraweld_device_describe(NULL) && !loraweld_adapter_name(NULL) && !loraweld_merged_report(NULL));
    CHECK(loraweld_adapter_layer_count(NULL) == 0);
    loraweld_cancel_set(NULL);
    loraweld_cancel_reset(NULL);
    loraweld_cancel_free(NULL);
    loraweld_device_free(NULL);
    loraweld_adapter_free(NULL);
    loraweld_calibration_free(NULL);
    loraweld_merged_free(NULL);
    CHECK(files_in_scratch() == 0);
}

enum { TOKENS = 96, WIDTH = 128 };

/* Halves of small whole numbers, which all three types hold: the types must agree to the bit. */
static LoraweldCalibration *by_pointers(const LoraweldDevice *device, const LoraweldAdapter *const *pool, const char *dtype) {
    static float as_f32[TOKENS * WIDTH];
    static uint16_t as_16[TOKENS * WIDTH];
    LoraweldCalibration *calibration;
    OK(loraweld_calibration_new(pool, 2, &calibration));
    uint32_t chance = 1;
    for (size_t k = 0; k < loraweld_adapter_layer_count(pool[0]); k++) {
        LoraweldLayer layer;
        OK(loraweld_adapter_layer(pool[0], k, &layer));
        CHECK(layer.input <= WIDTH || TOKENS * WIDTH / layer.input > 0);
        size_t tokens = TOKENS * WIDTH / layer.input;
        for (size_t task = 0; task < 3; task++) {
            for (size_t i = 0; i < tokens * layer.input; i++) {
                chance = chance * 1664525 + 1013904223;
                float value = (float)(int)(chance >> 29) / 2 - 1.5f;
                uint32_t bits;
                memcpy(&bits, &value, 4);
                as_f32[i] = value;
                uint32_t half = (bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff);
                as_16[i] = (uint16_t)(!strcmp(dtype, "bf16") ? bits >> 16 : value == 0 ? 0 : half);
            }
            const void *values = !strcmp(dtype, "f32") ? (const void *)as_f32 : as_16;
            LoraweldMatrix inputs = {dtype, tokens, layer.input, values};
            OK(loraweld_calibration_accumulate(calibration, device, task < 2 ? task : LORAWELD_NEUTRAL, layer.name, &inputs));
        }
    }
    return calibration;
}

static void calibrations(const LoraweldDevice *device, const LoraweldAdapter *const *pool) {
    const char *dtypes[3] = {"f32", "f16", "bf16"};
    char saved[3][4096];
    for (int i = 0; i < 3; i++) {
        LoraweldCalibration *calibration = by_pointers(device, pool, dtypes[i]);
        snprintf(saved[i], sizeof saved[i], "%s", path(scratch, dtypes[i]));
        OK(loraweld_calibration_save(calibration, saved[i], false));
        REFUSED(FILE, dtypes[i], loraweld_calibration_save(calibration, saved[i], false));
        OK(loraweld_calibration_save(calibration, saved[i], true));
        CHECK(same_bytes(saved[0], saved[i]));

        float value = 0.0f / 1.0f;
        LoraweldMatrix inputs = {"f32", 1, 1, &value};
        LoraweldLayer layer;
        OK(loraweld_adapter_layer(pool[0], 0, &layer));
        REFUSED(LAYER, "width 1", loraweld_calibration_accumulate(calibration, device, 0, layer.name, &inputs));
        REFUSED(LAYER, "nowhere", loraweld_calibration_accumulate(calibration, device, 0, "nowhere", &inputs));
        REFUSED(INVALID, "7", loraweld_calibration_accumulate(calibration, device, 7, layer.name, &inputs));
        inputs.values = NULL;
        REFUSED(INVALID, "`inputs.values` is NULL", loraweld_calibration_accumulate(calibration, device, 0, layer.name, &inputs));
        inputs = (LoraweldMatrix){"f32", SIZE_MAX, 2, &value};
        REFUSED(INVALID, "larger than memory", loraweld_calibration_accumulate(calibration, device, 0, layer.name, &inputs));
        inputs.dtype = "i8";
        REFUSED(INVALID, "dtype: `i8`", loraweld_calibration_accumulate(calibration, device, 0, layer.name, &inputs));
        REFUSED(INVALID, "`inputs` is NULL", loraweld_calibration_accumulate(calibration, device, 0, layer.name, NULL));
        loraweld_calibration_free(calibration);
    }

    LoraweldCalibration *opened, *none;
    OK(loraweld_calibration_open(saved[0], &opened));
    REFUSED(FILE, "concept_c3_mirror", loraweld_calibration_open(path(data, "loras/concept_c3_mirror.safetensors"), &none));
    CHECK(!none);
    REFUSED(INVALID, "at least one adapter", loraweld_calibration_new(pool, 0, &none));
    LoraweldMerged *merged;
    OK(loraweld_merge(device, "ssr", "{\"neutral_weight\": 0.5}", pool, NULL, 2, opened, NULL, &merged));
    CHECK(strstr(loraweld_merged_report(merged), "\"method\":\"ssr\""));
    CHECK(strstr(loraweld_merged_report(merged), "\"neutral_weight\":0.5"));
    loraweld_merged_free(merged);
    loraweld_calibration_free(opened);
    for (int i = 0; i < 3; i++) CHECK(!remove(saved[i]));
}

struct seen {
    int merge;
    uint64_t done, total;
    pthread_t thread;
};

static void count(void *user, const LoraweldProgress *progress) {
    struct seen *seen = user;
    CHECK(pthread_equal(seen->thread, pthread_self()));
    CHECK(progress->stage && progress->item && progress->done <= progress->total);
    seen->merge += !strcmp(progress->stage, "merge");
    seen->done = progress->done;
    seen->total = progress->total;
}

static void every_method(const LoraweldDevice *device, const LoraweldAdapter *const *pool) {
    LoraweldCalibration *calibration;
    OK(loraweld_calibration_new(pool, 2, &calibration));
    OK(loraweld_calibration_accumulate_file(calibration, device, 0, path(data, "activations/step1/concept_c3_mirror.safetensors"), NULL));
    OK(loraweld_calibration_accumulate_file(calibration, device, 1, path(data, "activations/step1/concept_c7_rot90.safetensors"), NULL));
    static const char *const methods[][2] = {
        {"ssr", "{\"ridge\": {\"absolute\": 1e-4}, \"prior\": \"zero\"}"},
        {"ssr-data-free", NULL},
        {"np-lora", "{\"projection\": \"hard\", \"by_layer\": [[\"*to_q\", {\"soft\": 0.5}]], \"directions\": {\"count\": 2}}"},
        {"linear", "{}"},
        {"svd", "{\"rank\": 4}"},
        {"ties", "{\"density\": 0.5, \"rank\": 4}"},
        {"dare", "{\"seed\": 7, \"truncate\": {\"spectrum\": {\"frobenius\": 0.9}}}"},
        {"knots", "{\"rule\": \"dare\", \"seed\": 7}"},
        {"core", NULL},
        {"tsv", NULL},
        {"iso-c", "{\"truncate\": {\"rank\": 2}}"},
    };
    const double strengths[2] = {1.0, -0.5};
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        struct seen seen = {.thread = pthread_self()};
        LoraweldControl control = {.progress = count, .user = &seen};
        LoraweldMerged *merged;
        LoraweldAdapter *adapter, *again;
        OK(loraweld_merge(device, methods[i][0], methods[i][1], pool, strengths, 2, calibration, &control, &merged));
        CHECK(seen.merge > 0 && seen.done == seen.total && seen.total > 0);
        const char *report = loraweld_merged_report(merged);
        CHECK(strstr(report, "\"strength\":-0.5") && !strstr(report, "\"losses\":null,\"notes\":[],\"seconds\""));
        OK(loraweld_merged_adapter(merged, &adapter));
        loraweld_merged_free(merged);

        const char *file = path(scratch, "merged.safetensors");
        OK(loraweld_adapter_save(adapter, file, NULL));
        REFUSED(FILE, "merged.safetensors", loraweld_adapter_save(adapter, file, NULL));
        const LoraweldSaveOptions over = {.dtype = "bf16", .format = "comfyui", .overwrite = true};
        OK(loraweld_adapter_save(adapter, file, &over));
        again = open_adapter(file);
        CHECK(loraweld_adapter_layer_count(again) == loraweld_adapter_layer_count(adapter));
        loraweld_adapter_free(again);
        loraweld_adapter_free(adapter);
        CHECK(!remove(file));
    }
    loraweld_calibration_free(calibration);
    CHECK(files_in_scratch() == 0);
}

/* The same merge twice gives the same file, and never replaces an input. */
static void twice(const LoraweldDevice *device, const LoraweldAdapter *const *small) {
    char files[2][4096];
    const char *input = path(scratch, "input.safetensors");
    OK(loraweld_adapter_save(small[0], input, NULL));
    LoraweldAdapter *copy = open_adapter(input);
    const LoraweldAdapter *const pool[2] = {copy, small[1]};
    const LoraweldSaveOptions over = {.overwrite = true};
    for (int i = 0; i < 2; i++) {
        LoraweldMerged *merged;
        LoraweldAdapter *adapter;
        OK(loraweld_merge(device, "dare", NULL, pool, NULL, 2, NULL, NULL, &merged));
        OK(loraweld_merged_adapter(merged, &adapter));
        snprintf(files[i], sizeof files[i], "%s", path(scratch, i ? "b" : "a"));
        OK(loraweld_adapter_save(adapter, files[i], NULL));
        CHECK(loraweld_adapter_save(adapter, input, &over) != LORAWELD_STATUS_OK);
        CHECK(strstr(loraweld_last_error(), "input.safetensors"));
        loraweld_adapter_free(adapter);
        loraweld_merged_free(merged);
    }
    CHECK(same_bytes(files[0], files[1]));
    CHECK(!remove(files[0]) && !remove(files[1]) && !remove(input));
    loraweld_adapter_free(copy);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec / 1e6;
}

static void pause_ms(long ms) {
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

struct run {
    const LoraweldDevice *device;
    const char *method;
    const LoraweldAdapter *const *pool;
    LoraweldCancel *cancel;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int begun, wait, cancelled;
    LoraweldStatus status;
    char message[64];
    double returned;
};

/* Tells the other thread that the merge has begun and, if it is asked to, waits there until it was cancelled. */
static void begin(void *user, const LoraweldProgress *progress) {
    struct run *run = user;
    if (strcmp(progress->stage, "merge")) return;
    pthread_mutex_lock(&run->mutex);
    run->begun = 1;
    pthread_cond_broadcast(&run->changed);
    while (run->wait && !run->cancelled) pthread_cond_wait(&run->changed, &run->mutex);
    pthread_mutex_unlock(&run->mutex);
}

static void *merge(void *user) {
    struct run *run = user;
    LoraweldControl control = {begin, run, run->cancel};
    LoraweldMerged *merged;
    const char *options = strcmp(run->method, "svd") ? NULL : "{\"rank\": 8}";
    run->status = loraweld_merge(run->device, run->method, options, run->pool, NULL, 2, NULL, &control, &merged);
    run->returned = now();
    /* Of this thread: the message is not the other one's. */
    snprintf(run->message, sizeof run->message, "%s", loraweld_last_error());
    CHECK(!merged == (run->status != LORAWELD_STATUS_OK));
    loraweld_merged_free(merged);
    pthread_mutex_lock(&run->mutex);
    run->begun = 1;
    pthread_cond_broadcast(&run->changed);
    pthread_mutex_unlock(&run->mutex);
    return NULL;
}

/* Milliseconds from setting the token to the return of the call; -1 if it was faster than the token. */
static double cancelled(struct run *run, long after) {
    pthread_t thread;
    run->begun = run->cancelled = 0;
    loraweld_cancel_reset(run->cancel);
    CHECK(!pthread_create(&thread, NULL, merge, run));
    pthread_mutex_lock(&run->mutex);
    while (!run->begun) pthread_cond_wait(&run->changed, &run->mutex);
    pthread_mutex_unlock(&run->mutex);
    pause_ms(after);
    double set = now();
    loraweld_cancel_set(run->cancel);
    pthread_mutex_lock(&run->mutex);
    run->cancelled = 1;
    pthread_cond_broadcast(&run->changed);
    pthread_mutex_unlock(&run->mutex);
    CHECK(!pthread_join(thread, NULL));
    if (run->status == LORAWELD_STATUS_OK) return -1;
    CHECK(run->status == LORAWELD_STATUS_CANCELLED && !strcmp(run->message, "cancelled"));
    CHECK(files_in_scratch() == 0);
    return run->returned - set;
}

static void cancelling(const LoraweldDevice *device, const LoraweldAdapter *const *pool, double limit) {
    static const char *const methods[] = {"ssr-data-free", "np-lora", "linear", "svd",   "ties",
                                          "dare",          "knots",   "core",   "tsv", "iso-c"};
    struct run run = {.device = device, .pool = pool};
    CHECK(!pthread_mutex_init(&run.mutex, NULL) && !pthread_cond_init(&run.changed, NULL));
    OK(loraweld_cancel_new(&run.cancel));
    REFUSED(INVALID, "is NULL", loraweld_cancel_new(NULL));
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        run.method = methods[i];
        /* While the callback waits, there is no doubt about who is first. */
        run.wait = 1;
        CHECK(cancelled(&run, 0) >= 0);
        CHECK(strstr(loraweld_last_error(), "is NULL"));
        if (!limit) continue;
        /* In the middle of the work. A busy machine may be late now and then, so the best of some counts. */
        run.wait = 0;
        double best = 1e9, worst = 0;
        for (int k = 0; k < 5; k++) {
            double took = cancelled(&run, 10 * k);
            if (took < 0) continue;
            best = took < best ? took : best;
            worst = took > worst ? took : worst;
        }
        if (worst) printf("%s: cancelled in %.1f to %.1f ms\n", run.method, best, worst);
        else printf("%s: was done first\n", run.method);
        CHECK(best < limit || best == 1e9);
    }
    loraweld_cancel_free(run.cancel);
    pthread_cond_destroy(&run.changed);
    pthread_mutex_destroy(&run.mutex);
}

int main(int argc, char **argv) {
    if (argc != 3 && argc != 5) {
        fprintf(stderr, "usage: %s DATA SCRATCH [LARGE_1 LARGE_2]\n", argv[0]);
        return 2;
    }
    data = argv[1];
    scratch = argv[2];
    CHECK(!strcmp(loraweld_last_error(), ""));
    LoraweldDevice *device;
    OK(loraweld_device_open("cpu", "auto", (uint64_t)1 << 30, &device));
    CHECK(strstr(loraweld_device_describe(device), "CPU"));
    LoraweldAdapter *small[2] = {open_adapter(path(data, "loras/concept_c3_mirror.safetensors")),
                                 open_adapter(path(data, "loras/concept_c7_rot90.safetensors"))};
    const LoraweldAdapter *const pool[2] = {small[0], small[1]};
    CHECK(!strcmp(loraweld_adapter_name(pool[0]), "concept_c3_mirror"));
    refusals(device, pool);
    calibrations(device, pool);
    every_method(device, pool);
    twice(device, pool);
    if (argc == 5) {
        LoraweldAdapter *large[2] = {open_adapter(argv[3]), open_adapter(argv[4])};
        const LoraweldAdapter *const both[2] = {large[0], large[1]};
        cancelling(device, both, 100);
        loraweld_adapter_free(large[0]);
        loraweld_adapter_free(large[1]);
    } else {
        cancelling(device, pool, 0);
    }
    loraweld_adapter_free(small[0]);
    loraweld_adapter_free(small[1]);
    loraweld_device_free(device);
    printf("all checks passed\n");
    return 0;
}
