"""Caps on the registers of kernels: what each is for, _tuning.py says.

Written by `make gpu-budget ARGS=--update`: kernel and architecture, short name of the
compilation, registers.
"""

CAPS: dict[tuple[str, int], dict[str, int]] = {
    ("_activation_dropout_bwd_kernel", 86): {
        "ffb525caaa": 56,  # bf16 D64
    },
    ("_draw_sums_kernel", 86): {
        "3b56f8cdaa": 200,  # fp64 D256 all
    },
    ("_entry_sums_kernel", 86): {
        "5285225860": 184,  # fp64 D64 all #2
    },
    ("_item_topk_fwd_kernel", 80): {
        "3489055ab4": 255,  # bf16 D100 k=20
        "f1531af07c": 255,  # fp32 D16 all k=20
        "518e22fdd7": 255,  # fp32 D256 all k=20
        "dd9a05b963": 255,  # fp32 D32 all k=20
        "7dcb60346d": 255,  # fp32 D512 all k=20
        "2b73ef20da": 255,  # tf32 D256 all k=20
        "a05b345a87": 255,  # tf32 D64 all k=20
    },
    ("_item_topk_fwd_kernel", 86): {
        "f1531af07c": 255,  # fp32 D16 all k=20
        "518e22fdd7": 255,  # fp32 D256 all k=20
        "dd9a05b963": 255,  # fp32 D32 all k=20
        "7dcb60346d": 255,  # fp32 D512 all k=20
        "2b73ef20da": 255,  # tf32 D256 all k=20
        "a05b345a87": 255,  # tf32 D64 all k=20
    },
    ("_item_topk_fwd_kernel", 120): {
        "a1337791d0": 255,  # bf16 D16 all k=20
        "1a99900563": 255,  # bf16 D32 all k=20
        "f1531af07c": 255,  # fp32 D16 all k=20
        "8d68860baa": 255,  # fp32 D16 k=20
        "518e22fdd7": 255,  # fp32 D256 all k=20
        "9b3849fc3f": 255,  # fp32 D256 k=20
        "dd9a05b963": 255,  # fp32 D32 all k=20
        "7dcb60346d": 255,  # fp32 D512 all k=20
        "012232ff8b": 255,  # fp32 D512 k=20
        "2b73ef20da": 255,  # tf32 D256 all k=20
        "06f1bb811f": 255,  # tf32 D256 k=20
        "a05b345a87": 255,  # tf32 D64 all k=20
        "94538e2caf": 255,  # tf32 D64 k=20
    },
    ("_sampled_softmax_loss_bwd_kernel", 80): {
        "d2a324035d": 255,  # bf16 D16
        "1ae1b19980": 255,  # bf16 D32
        "26f638d7e5": 255,  # bf16 D32 all
    },
    ("_sampled_softmax_loss_bwd_kernel", 86): {
        "173f115fea": 64,  # fp64 D16 all
    },
    ("_sampled_softmax_loss_fwd_kernel", 86): {
        "237843c46b": 255,  # bf16 D16
    },
    ("_sampled_softmax_loss_fwd_kernel", 90): {
        "a89a1475dc": 168,  # fp32 D16
    },
    ("_sampled_softmax_loss_fwd_kernel", 120): {
        "237843c46b": 255,  # bf16 D16
        "30a601e089": 255,  # bf16 D256 all
        "af5f058896": 255,  # bf16 D512 all
        "c4f59096a9": 255,  # fp16 D256 all
    },
    ("_sampled_softmax_loss_rows_fwd_kernel", 80): {
        "5273e3c2e1": 128,  # bf16 D128 all
        "33127ef79f": 56,  # bf16 D16 all
        "286f8bd58a": 128,  # fp16 D128 all
        "750fe65cc3": 64,  # fp64 D16 all
    },
    ("_sampled_softmax_loss_rows_fwd_kernel", 86): {
        "5273e3c2e1": 128,  # bf16 D128 all
        "33127ef79f": 56,  # bf16 D16 all
        "286f8bd58a": 128,  # fp16 D128 all
        "000d28a497": 168,  # fp32 D512
        "750fe65cc3": 64,  # fp64 D16 all
    },
    ("_sampled_softmax_loss_rows_fwd_kernel", 90): {
        "e25e1e7df0": 96,  # fp64 D32
        "a8e6aee684": 128,  # tf32 D256 all
        "aad4020fde": 96,  # tf32 D64 all
    },
    ("_sampled_softmax_loss_rows_fwd_kernel", 100): {
        "4515387a7f": 80,  # fp64 D32 all
        "aad4020fde": 96,  # tf32 D64 all
    },
    ("_sampled_softmax_loss_rows_fwd_kernel", 120): {
        "0c584ef8d9": 128,  # bf16 D100
        "169b134708": 168,  # fp64 D256 all
        "aeee259ae9": 128,  # tf32 D256
    },
    ("_segment_sums_kernel", 120): {
        "13b5faef74": 64,  # bf16 D128 all
        "33937bf34a": 64,  # bf16 D128 all
        "8984737d37": 64,  # fp16 D128 all
        "d4cdd06f0c": 64,  # fp16 D128 all
    },
    ("_session_attention_queries_kernel", 100): {
        "98e2735725": 168,  # bf16 D48 all
    },
    ("_target_rank_fwd_kernel", 86): {
        "2d6a67acae": 168,  # fp64 D32 all #2
        "938e4161cf": 168,  # tf32 D64 #2
    },
    ("_target_rank_fwd_kernel", 90): {
        "2d6a67acae": 255,  # fp64 D32 all #2
    },
    ("_target_rank_fwd_kernel", 100): {
        "1f43b7c085": 255,  # fp32 D64 #2
    },
    ("_target_rank_fwd_kernel", 120): {
        "173029270b": 255,  # fp64 D256 #2
        "f3db05140d": 255,  # fp64 D256 all #2
        "bca57c6e0a": 255,  # fp64 D64 #2
        "7e869ee107": 255,  # fp64 D64 all #2
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
    ("_tied_softmax_loss_fwd_kernel", 86): {
        "5d8ad25125": 128,  # bf16 D32 all #4
        "df0e501c9d": 80,  # fp64 D64
    },
    ("_tied_softmax_loss_fwd_kernel", 90): {
        "8a17293879": 255,  # fp32 D16 all #4
    },
    ("_tied_softmax_loss_fwd_kernel", 100): {
        "ea206d1ebe": 255,  # bf16 D100 #6
        "e7239b781d": 255,  # bf16 D100 all #5
        "68e581edce": 255,  # bf16 D16 all #8
        "e7b04bf686": 80,  # bf16 D16 all #9
        "0aa62611c5": 255,  # bf16 D32 all #8
        "2b91918d1f": 255,  # bf16 D64 all #8
        "09e41bf22f": 80,  # fp16 D64 all #9
        "c7f1330799": 168,  # fp32 D32 #5
        "9e2a4eb006": 255,  # fp32 D64 all #6
    },
    ("_tied_softmax_loss_fwd_kernel", 120): {
        "6e4e050f4d": 255,  # bf16 D100
        "0a5bc72c2d": 168,  # bf16 D16 all #3
        "fd69bbe3e8": 255,  # bf16 D32 all #3
        "9ee675e804": 255,  # fp32 D128 all
        "775df3bb65": 255,  # fp32 D16 #4
        "8a17293879": 255,  # fp32 D16 all #4
        "8f669d8d62": 255,  # fp32 D256 all
        "aab0a3564a": 255,  # fp32 D512 all
        "9c418751ac": 72,  # fp64 D16 #2
        "c94bbdbcd2": 168,  # fp64 D256 all #2
        "0191f69872": 128,  # fp64 D256 all #3
        "8952211679": 128,  # fp64 D64 all #3
    },
    ("_tied_softmax_loss_items_kernel", 80): {
        "bc21d86ec1": 255,  # bf16 D100 all #2
    },
    ("_tied_softmax_loss_items_kernel", 86): {
        "fbfa1dc595": 80,  # bf16 D16
        "e1ac121399": 64,  # fp64 D16
    },
    ("_tied_softmax_loss_items_kernel", 90): {
        "f1cc68b10b": 255,  # fp32 D16 all #2
        "d7a96c5e88": 255,  # fp32 D64 all
        "88266a2b56": 96,  # tf32 D64 #2
    },
    ("_tied_softmax_loss_items_kernel", 100): {
        "969972e0da": 255,  # bf16 D32 all #2
        "f1cc68b10b": 255,  # fp32 D16 all #2
        "0296f5d798": 255,  # fp32 D32 all
        "d7a96c5e88": 255,  # fp32 D64 all
    },
    ("_tied_softmax_loss_items_kernel", 120): {
        "3c7a93bb16": 80,  # bf16 D16 all #2
        "db5654a53e": 80,  # tf32 D64 #2
    },
    ("_tied_table_step_catch_up_kernel", 86): {
        "0d7c739e0d": 136,  # bf16 D512 all
    },
    ("_tied_table_step_factors_kernel", 120): {
        "5705a34164": 96,  # fp64 D256 all
        "dfa7fcb550": 80,  # fp64 D64 all
    },
    ("_tied_table_step_items_kernel", 80): {
        "c7dd896232": 96,  # bf16 D512 all #2
        "15c79b4280": 200,  # bf16 D64 all #7
        "18717d7a2b": 144,  # fp16 D64 all
        "c7af8b48f2": 200,  # fp16 D64 all #4
        "6dbfae7d19": 80,  # fp32 D32 all
        "168dd09838": 96,  # fp32 D32 all #2
        "4776dfb439": 96,  # fp64 D256
        "fc8b51f1af": 96,  # tf32 D256 all
        "0864239a9b": 96,  # tf32 D64 all #4
    },
    ("_tied_table_step_items_kernel", 86): {
        "d5239358a0": 96,  # bf16 D128 all #2
        "c8a33a628f": 200,  # bf16 D64 all #5
        "01d58f319a": 48,  # fp16 D64 #2
        "c7af8b48f2": 200,  # fp16 D64 all #4
        "873fcf6d0a": 168,  # fp32 D64 all #2
        "f456dd2890": 72,  # fp64 D16 all
        "b8d6d68ff5": 96,  # fp64 D256 all
        "5451476284": 80,  # fp64 D32 all
        "2c6884f5d6": 96,  # fp64 D64 #5
        "951dbafbc0": 80,  # fp64 D64 all
        "4138d76b75": 128,  # fp64 D64 all #3
        "11c01a3b9c": 72,  # tf32 D64 #6
        "0864239a9b": 80,  # tf32 D64 all #4
    },
    ("_tied_table_step_items_kernel", 90): {
        "c7af8b48f2": 200,  # fp16 D64 all #4
        "ce911c7d0e": 80,  # fp32 D16 #2
        "873fcf6d0a": 168,  # fp32 D64 all #2
        "f8699e008f": 168,  # fp64 D16 all #2
        "c817d35a23": 168,  # fp64 D32 all #2
        "9fc64f7572": 168,  # fp64 D64 all #4
        "8207d4f3a1": 56,  # tf32 D64
    },
    ("_tied_table_step_items_kernel", 100): {
        "11f74d999d": 128,  # fp32 D16 all
        "c817d35a23": 168,  # fp64 D32 all #2
        "9fc64f7572": 168,  # fp64 D64 all #4
        "8207d4f3a1": 56,  # tf32 D64
        "86f950920e": 80,  # tf32 D64 all #3
    },
    ("_tied_table_step_items_kernel", 120): {
        "01c8b24eb3": 80,  # bf16 D512
        "94afcbbf31": 168,  # fp32 D64 all #5
        "f456dd2890": 72,  # fp64 D16 all
        "d61416a858": 80,  # fp64 D64
        "36d1c3f268": 128,  # fp64 D64 #3
        "2c6884f5d6": 96,  # fp64 D64 #5
        "4138d76b75": 128,  # fp64 D64 all #3
        "25ac96899c": 96,  # tf32 D64 all #2
    },
}
