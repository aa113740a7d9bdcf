//! What was looked up in the kernel's BTF, kept for as long as this boot lasts.
//!
//! Reading and walking 5 MB costs milliseconds, a small dump as a whole costs few. Whatever the kept file says, the
//! verifier checks each offset against the types.

use criu_common::offsets::Source;

use super::EbpfResult;
use super::btf::Layout;
use crate::kernel::kept;

/// The layout of this kernel's types: from the cache, else from BTF and into the cache.
pub fn layout(sources: &[Source], functions: &[&str]) -> EbpfResult<Layout> {
    let name = name(sources, functions);
    let kept = name.as_deref().and_then(kept::read);
    if let Some(layout) = kept.and_then(|text| parse(&text, sources.len(), functions.len())) {
        return Ok(layout);
    }
    let layout = Layout::of_this_kernel(sources, functions)?;
    if let Some(name) = name
        && let Err(error) = kept::write(&name, &text(&layout))
    {
        tracing::debug!(name, %error, "cannot keep the kernel's type layout for the next time");
    }
    Ok(layout)
}

/// Named after what was asked for: another engine with another table has another file.
fn name(sources: &[Source], functions: &[&str]) -> Option<String> {
    let sources = sources.iter().flat_map(|source| [source.of.as_bytes(), source.field.as_bytes()]);
    kept::name("btf", sources.chain(functions.iter().map(|function| function.as_bytes())))
}

fn text(layout: &Layout) -> String {
    let line = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    format!("{}\n{}\n", line(&layout.offsets), line(&layout.functions))
}

fn parse(text: &str, offsets: usize, functions: usize) -> Option<Layout> {
    // The last line ends with a line feed: a file that was cut short is not taken for a whole one.
    let (line, rest) = text.split_once('\n')?;
    let ids = rest.strip_suffix('\n')?;
    let numbers = |line: &str| line.split(' ').map(|word| word.parse().ok()).collect::<Option<Vec<u32>>>();
    let layout = Layout { offsets: numbers(line)?, functions: numbers(ids)? };
    (layout.offsets.len() == offsets && layout.functions.len() == functions).then_some(layout)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFSETS: usize = 40;

    #[test]
    fn a_file_is_taken_whole_or_not_at_all() {
        let offsets = (0..OFFSETS).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        let text = format!("{offsets}\n7 8 9\n");
        let layout = parse(&text, OFFSETS, 3).expect("what write writes");
        assert_eq!(layout.functions, [7, 8, 9]);
        assert_eq!(layout.offsets.last(), Some(&(OFFSETS as u32 - 1)));
        assert_eq!(parse(&text, OFFSETS, 2), None);
        for end in 0..text.len() {
            assert_eq!(parse(&text[..end], OFFSETS, 3), None, "cut at {end}");
        }
    }
}
