//! Pipes and FIFOs.

use std::process::Stdio;

use e2e::{Options, Program, Workload, proc, rows, workload_rows};

workload_rows! { "pipes.py";
    content
    empty
    full
    larger
    smaller
    pieces
    packets
    small_packets
    only_read_end
    only_write_end
    across_processes
    pipeline
    blocked_reader
    reopened
    fifo
    fifo_both_ways
    fifo_unlinked
    fifo_lonely
    fifo_written
}

rows! {
    /// Somebody outside holds the other end: what would come out of it afterwards nobody can say, so it is refused,
    /// and the program goes on with its pipe as if nothing had been.
    other_end_outside => |row| {
        let (reader, mut writer) = std::io::pipe().expect("pipe");
        let workload = Workload::new("pipes.py", "other_end_outside");
        let mut program = Program::start_with(&workload, "setsid", |command, dir| {
            let out = std::fs::File::create(dir.join("out")).expect("creating the output file");
            command.stdin(Stdio::from(reader)).stdout(out.try_clone().expect("dup")).stderr(out);
        });
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &row.options).expect_refusal("pipe");
        std::io::Write::write_all(&mut writer, b"from outside").expect("writing");
        program.finish();
    };

    /// The same, but it is said to be so, and at the restore another pipe is given for it.
    other_end_given => |row| {
        let (reader, writer) = std::io::pipe().expect("pipe");
        let workload = Workload::new("pipes.py", "other_end_outside");
        let mut program = Program::start_with(&workload, "setsid", |command, dir| {
            let out = std::fs::File::create(dir.join("out")).expect("creating the output file");
            command.stdin(Stdio::from(reader)).stdout(out.try_clone().expect("dup")).stderr(out);
        });
        let link = proc::descriptors(program.pid())[&0].display().to_string();
        let images = row.with(Options::dump(&["--external", &link])).dump(&program);
        drop(writer);
        row.restorer.restore(&images, &row.options).expect_refusal("--inherit-fd");
        let (reader, mut writer) = std::io::pipe().expect("pipe");
        let options = Options::given(&link, reader);
        row.with(options).restore(&program, &images);
        std::io::Write::write_all(&mut writer, b"from outside").expect("writing");
        program.finish();
    };
}

mod interop {
    e2e::interop_rows! { "pipes.py";
        content full larger smaller across_processes pipeline only_read_end only_write_end reopened
        fifo fifo_both_ways fifo_unlinked
    }
}
