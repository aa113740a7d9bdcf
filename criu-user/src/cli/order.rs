//! Options may stand before the command, as CRIU takes them: `criu-ebpf -t 41 -D images dump`.

use std::ffi::OsString;

use clap::{Arg, Command, CommandFactory};

use super::Cli;

/// The words of the command line, in the order in which the parser takes them.
pub(super) fn words() -> Vec<OsString> {
    let words: Vec<_> = std::env::args_os().collect();
    if !words.get(1).is_some_and(|word| word.as_encoded_bytes().starts_with(b"-")) {
        return words;
    }
    let mut cli = Cli::command();
    cli.build();
    command_first(words, &cli)
}

/// The same words with the command in front, where the first of them is an option.
///
/// Whether an option takes the next word is known from the commands that have it. Where no command is found, the words
/// stay as they are, and the parser says what is wrong with them.
fn command_first(mut words: Vec<OsString>, cli: &Command) -> Vec<OsString> {
    if let Some(at) = command(&words, cli).filter(|&at| at > 1) {
        words[1..=at].rotate_right(1);
    }
    words
}

/// Where the command stands.
fn command(words: &[OsString], cli: &Command) -> Option<usize> {
    let mut at = 1;
    loop {
        let word = words.get(at)?.to_str()?;
        match word.strip_prefix('-') {
            None => return cli.find_subcommand(word).map(|_| at),
            // "--": what follows are no options; "-" is none either.
            Some("-" | "") => return None,
            Some(option) => at += 1 + usize::from(takes_next(option, cli)),
        }
    }
}

/// Whether the value of an option, given without its first dash, is the word behind it.
fn takes_next(option: &str, cli: &Command) -> bool {
    let known = |is: &dyn Fn(&Arg) -> bool| {
        let mut all = cli.get_subcommands().flat_map(Command::get_arguments);
        all.any(|arg| is(arg) && needs_word(arg))
    };
    if let Some(name) = option.strip_prefix('-') {
        return known(&|arg| arg.get_long_and_visible_aliases().is_some_and(|names| names.contains(&name)));
    }
    // Of letters written together, the first that takes a value takes the rest of the word, if there is any.
    let takes = |letter| known(&|arg: &Arg| arg.get_short() == Some(letter));
    option.chars().position(takes).is_some_and(|first| first + 1 == option.chars().count())
}

fn needs_word(arg: &Arg) -> bool {
    let least = arg.get_num_args().map_or(0, |range| range.min_values());
    least > 0 && !arg.is_require_equals_set() && arg.get_action().takes_values()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(words: &str, expected: &str) {
        let mut cli = Cli::command();
        cli.build();
        let words: Vec<OsString> = words.split(' ').map(OsString::from).collect();
        let expected: Vec<OsString> = expected.split(' ').map(OsString::from).collect();
        assert_eq!(command_first(words, &cli), expected);
    }

    #[test]
    fn the_command_comes_to_the_front() {
        check("x dump -t 1", "x dump -t 1");
        check("x -t 1 -D images dump -v4", "x dump -t 1 -D images -v4");
        check("x -v4 --images-dir images restore -d", "x restore -v4 --images-dir images -d");
        check("x --images-dir=restore dump", "x dump --images-dir=restore");
        check("x --tcp-established -Rt 1 dump", "x dump --tcp-established -Rt 1");
        check("x -Rt1 -vvvv dump", "x dump -Rt1 -vvvv");
    }

    #[test]
    fn a_value_is_no_command() {
        check("x -D dump dump -t 1", "x dump -D dump -t 1");
        check("x -D dump", "x -D dump");
    }

    #[test]
    fn what_has_none_stays() {
        check("x", "x");
        check("x --help", "x --help");
        check("x -- dump", "x -- dump");
        check("x --unheard-of word dump", "x --unheard-of word dump");
    }
}
