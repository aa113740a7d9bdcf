//! The end-to-end tests: one module per kind of kernel object or program.

mod check;
mod commands;
mod counter;
mod credentials;
mod events;
mod files;
mod freeze;
mod inet;
mod killed;
mod memory;
mod pipes;
mod programs;
mod refusals;
mod registers;
mod screen;
mod sessions;
mod signals;
mod survey;
mod tcp;
mod tcp_programs;
mod terminals;
mod threads;
mod timers;
mod track;
mod tree;
mod unix;
