"""Caps on the registers of kernels: what each is for, _tuning.py says.

Written by `make gpu-budget ARGS=--update`: kernel and architecture, short name of the
compilation, registers.
"""

CAPS: dict[tuple[str, int], dict[str, int]] = {
    ("_item_topk_fwd_kernel", 80): {
        "3489055ab4": 255,  # bf16 D100 k=20
        "518e22fdd7": 255,  # fp32 D256 all k=20
        "7dcb60346d": 255,  # fp32 D512 all k=20
        "2b73ef20da": 255,  # tf32 D256 all k=20
        "a05b345a87": 255,  # tf32 D64 all k=20
    },
    ("_item_topk_fwd_kernel", 86): {
        "518e22fdd7": 255,  # fp32 D256 all k=20
        "7dcb60346d": 255,  # fp32 D512 all k=20
        "2b73ef20da": 255,  # tf32 D256 all k=20
        "a05b345a87": 255,  # tf32 D64 all k=20
    },
    ("_item_topk_fwd_kernel", 120): {
        "518e22fdd7": 255,  # fp32 D256 all k=20
        "9b3849fc3f": 255,  # fp32 D256 k=20
        "7dcb60346d": 255,  # fp32 D512 all k=20
        "012232ff8b": 255,  # fp32 D512 k=20
        "2b73ef20da": 255,  # tf32 D256 all k=20
        "06f1bb811f": 255,  # tf32 D256 k=20
        "a05b345a87": 255,  # tf32 D64 all k=20
        "94538e2caf": 255,  # tf32 D64 k=20
    },
    ("_sampled_softmax_loss_fwd_kernel", 120): {
        "30a601e089": 255,  # bf16 D256 all
        "af5f058896": 255,  # bf16 D512 all
    },
    ("_sampled_softmax_loss_rows_fwd_kernel", 80): {
        "5273e3c2e1": 128,  # bf16 D128 all
    },
    ("_sampled_softmax_loss_rows_fwd_kernel", 86): {
        "5273e3c2e1": 128,  # bf16 D128 all
        "000d28a497": 168,  # fp32 D512
    },
    ("_sampled_softmax_loss_rows_fwd_kernel", 90): {
        "a8e6aee684": 128,  # tf32 D256 all
        "aad4020fde": 96,  # tf32 D64 all
    },
    ("_sampled_softmax_loss_rows_fwd_kernel", 100): {
        "aad4020fde": 96,  # tf32 D64 all
    },
    ("_sampled_softmax_loss_rows_fwd_kernel", 120): {
        "0c584ef8d9": 128,  # bf16 D100
        "aeee259ae9": 128,  # tf32 D256
    },
    ("_segment_sums_kernel", 120): {
        "13b5faef74": 64,  # bf16 D128 all
        "33937bf34a": 64,  # bf16 D128 all
    },
    ("_tied_softmax_loss_factors_kernel", 100): {
        "6cb399aa78": 128,  # fp32 D512 all
        "1ac87b5962": 128,  # tf32 D256 all
    },
    ("_tied_softmax_loss_factors_kernel", 120): {
        "ef30d98971": 64,  # bf16 D64 all
        "18e1893d8c": 128,  # fp32 D128 all
        "6cb399aa78": 128,  # fp32 D512 all
        "1ac87b5962": 128,  # tf32 D256 all
    },
    ("_tied_softmax_loss_fwd_kernel", 80): {
        "424fd39cea": 255,  # bf16 D64 all #2
        "9edae691e9": 255,  # fp16 D64 all #2
        "9f4de4df00": 80,  # tf32 D256
    },
    ("_tied_softmax_loss_fwd_kernel", 100): {
        "ea206d1ebe": 255,  # bf16 D100 #6
        "e7239b781d": 255,  # bf16 D100 all #5
        "2b91918d1f": 255,  # bf16 D64 all #8
        "09e41bf22f": 80,  # fp16 D64 all #9
        "9e2a4eb006": 255,  # fp32 D64 all #6
    },
    ("_tied_softmax_loss_fwd_kernel", 120): {
        "6e4e050f4d": 255,  # bf16 D100
        "9ee675e804": 255,  # fp32 D128 all
        "8f669d8d62": 255,  # fp32 D256 all
        "aab0a3564a": 255,  # fp32 D512 all
    },
    ("_tied_softmax_loss_items_kernel", 80): {
        "bc21d86ec1": 255,  # bf16 D100 all #2
    },
    ("_tied_softmax_loss_items_kernel", 90): {
        "d7a96c5e88": 255,  # fp32 D64 all
        "88266a2b56": 96,  # tf32 D64 #2
    },
    ("_tied_softmax_loss_items_kernel", 100): {
        "d7a96c5e88": 255,  # fp32 D64 all
    },
    ("_tied_softmax_loss_items_kernel", 120): {
        "db5654a53e": 80,  # tf32 D64 #2
    },
    ("_tied_table_step_catch_up_kernel", 86): {
        "0d7c739e0d": 136,  # bf16 D512 all
    },
    ("_tied_table_step_items_kernel", 80): {
        "c7dd896232": 96,  # bf16 D512 all #2
        "15c79b4280": 200,  # bf16 D64 all #7
        "18717d7a2b": 144,  # fp16 D64 all
        "c7af8b48f2": 200,  # fp16 D64 all #4
        "fc8b51f1af": 96,  # tf32 D256 all
        "0864239a9b": 96,  # tf32 D64 all #4
    },
    ("_tied_table_step_items_kernel", 86): {
        "d5239358a0": 96,  # bf16 D128 all #2
        "c8a33a628f": 200,  # bf16 D64 all #5
        "01d58f319a": 48,  # fp16 D64 #2
        "c7af8b48f2": 200,  # fp16 D64 all #4
        "873fcf6d0a": 168,  # fp32 D64 all #2
        "11c01a3b9c": 72,  # tf32 D64 #6
        "0864239a9b": 80,  # tf32 D64 all #4
    },
    ("_tied_table_step_items_kernel", 90): {
        "c7af8b48f2": 200,  # fp16 D64 all #4
        "873fcf6d0a": 168,  # fp32 D64 all #2
        "8207d4f3a1": 56,  # tf32 D64
    },
    ("_tied_table_step_items_kernel", 100): {
        "8207d4f3a1": 56,  # tf32 D64
        "86f950920e": 80,  # tf32 D64 all #3
    },
    ("_tied_table_step_items_kernel", 120): {
        "01c8b24eb3": 80,  # bf16 D512
        "94afcbbf31": 168,  # fp32 D64 all #5
        "25ac96899c": 96,  # tf32 D64 all #2
    },
}
