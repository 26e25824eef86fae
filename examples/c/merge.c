/*
 * Merges two adapters by SSR-Merge, from recorded activations to a file for kohya's tools:
 *
 *     cargo build --release -p loraweld-capi
 *     cc -Icapi/include examples/c/merge.c -Ltarget/release -lloraweld_c -Wl,-rpath,target/release -o merge
 *     ./merge auto merged.safetensors cat.safetensors cat-inputs.safetensors dog.safetensors dog-inputs.safetensors
 *
 * Ctrl-C stops it without leaving a file.
 */
#include <loraweld.h>

#include <signal.h>
#include <stdio.h>

static LoraweldCancel *cancel;

static void stop(int signal) {
    (void)signal;
    loraweld_cancel_set(cancel);
}

static void show(void *user, const LoraweldProgress *progress) {
    (void)user;
    printf("%s %llu/%llu %s\n", progress->stage, (unsigned long long)progress->done,
           (unsigned long long)progress->total, progress->item);
}

/* Leaves the function at the first call that fails. */
#define TRY(call)                                       \
    do {                                                \
        if ((call) != LORAWELD_STATUS_OK) {             \
            fprintf(stderr, "%s\n", loraweld_last_error()); \
            goto done;                                  \
        }                                               \
    } while (0)

int main(int argc, char **argv) {
    if (argc != 7) {
        fprintf(stderr, "usage: %s DEVICE OUT LORA_1 ACTIVATIONS_1 LORA_2 ACTIVATIONS_2\n", argv[0]);
        return 2;
    }
    int result = 1;
    LoraweldDevice *device = NULL;
    LoraweldAdapter *adapters[2] = {NULL, NULL}, *output = NULL;
    LoraweldCalibration *calibration = NULL;
    LoraweldMerged *merged = NULL;

    TRY(loraweld_cancel_new(&cancel));
    signal(SIGINT, stop);
    LoraweldControl control = {.progress = show, .cancel = cancel};

    TRY(loraweld_device_open(argv[1], NULL, 0, &device));
    printf("loraweld %s on %s\n", loraweld_version(), loraweld_device_describe(device));
    for (size_t i = 0; i < 2; i++) {
        TRY(loraweld_adapter_open(argv[3 + 2 * i], &adapters[i]));
        printf("%s: %zu layers\n", loraweld_adapter_name(adapters[i]), loraweld_adapter_layer_count(adapters[i]));
    }

    /* What the layers read while each adapter is active: recorded here. A host that runs the model itself calls
       loraweld_calibration_accumulate as it goes. */
    const LoraweldAdapter *const pool[2] = {adapters[0], adapters[1]};
    TRY(loraweld_calibration_new(pool, 2, &calibration));
    for (size_t i = 0; i < 2; i++) {
        TRY(loraweld_calibration_accumulate_file(calibration, device, i, argv[4 + 2 * i], &control));
    }

    const double strengths[2] = {1.0, 1.0};
    TRY(loraweld_merge(device, "ssr", "{\"ridge\": {\"relative\": 1e-3}}", pool, strengths, 2, calibration, &control,
                       &merged));
    printf("%s\n", loraweld_merged_report(merged));

    const LoraweldSaveOptions options = {.dtype = "f16", .format = "kohya"};
    TRY(loraweld_merged_adapter(merged, &output));
    TRY(loraweld_adapter_save(output, argv[2], &options));
    printf("wrote %s\n", argv[2]);
    result = 0;

done:
    signal(SIGINT, SIG_DFL);
    loraweld_adapter_free(output);
    loraweld_merged_free(merged);
    loraweld_calibration_free(calibration);
    loraweld_adapter_free(adapters[1]);
    loraweld_adapter_free(adapters[0]);
    loraweld_device_free(device);
    loraweld_cancel_free(cancel);
    return result;
}
