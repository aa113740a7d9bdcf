//! Registers, live across the dump, bit by bit.

use e2e::workload_rows;

workload_rows! { "registers.c";
    general
    sse
    avx2
    avx512
    masks
    x87
    in_a_system_call
    segment_bases
    rseq
}
