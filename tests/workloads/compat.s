# A 32-bit program that does nothing but wait: int $0x80 with 29 is pause(2).
	.globl _start
_start:
	movl $29, %eax
	int $0x80
	jmp _start
