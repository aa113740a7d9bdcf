//! Where the components of the processor's extended state lie in an XSAVE area (Intel SDM volume 1, chapter 13).

use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// A component: its offset in the standard format, and its length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Component {
    /// Bytes from the start of the area.
    pub offset: usize,
    /// Bytes.
    pub len: usize,
}

/// The components that this processor has, by their number; those it lacks have length 0.
pub fn components() -> &'static [Component; 32] {
    static COMPONENTS: OnceLock<[Component; 32]> = OnceLock::new();
    COMPONENTS.get_or_init(|| {
        let mut all = [Component::default(); 32];
        for (n, component) in all.iter_mut().enumerate().skip(2) {
            let leaf = __cpuid_count(0xd, n as u32);
            *component = Component { offset: leaf.ebx as usize, len: leaf.eax as usize };
        }
        all
    })
}
