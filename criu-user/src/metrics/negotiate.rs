//! Which of two texts somebody wants: the header `Accept` (RFC 9110, 12.5.1).

/// A form of the exposition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenMetrics.
    OpenMetrics,
    /// Prometheus's older text format.
    Text,
}

impl Format {
    /// What it is called by.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// The one that is wanted more; the older one where both are wanted as much, or none is: everybody can read it.
    pub fn wanted(accept: &str) -> Self {
        let weight = |format: &str| accept.split(',').filter_map(|range| weight_of(range, format)).fold(0.0, f64::max);
        let plain = weight("text/plain");
        let open = weight("application/openmetrics-text");
        if open > 0.0 && open >= plain && names(accept) { Self::OpenMetrics } else { Self::Text }
    }
}

/// Whether OpenMetrics is meant by its name: a browser's `*/*` is not.
fn names(accept: &str) -> bool {
    accept.split(',').any(|range| range.trim_start().starts_with("application/openmetrics-text"))
}

/// How much one range of media types wants a format, from 0 to 1; `None` if it says nothing of it.
fn weight_of(range: &str, format: &str) -> Option<f64> {
    let mut parts = range.split(';').map(str::trim);
    let media = parts.next()?;
    let is_meant = media == format || media == "*/*" || media.strip_suffix("/*").is_some_and(|t| format.starts_with(t));
    if !is_meant {
        return None;
    }
    let mut weight = 1.0;
    for part in parts {
        match part.split_once('=') {
            Some(("q", q)) => weight = q.parse().ok()?,
            // Of a version after 1.0.0 nothing is known.
            Some(("version", version))
                if media.ends_with("openmetrics-text") && !["0.0.1", "1.0.0"].contains(&version) =>
            {
                return None;
            }
            _ => {}
        }
    }
    Some(weight)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_gets_what_he_reads() {
        const PROMETHEUS: &str = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                                  text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        const NEWER: &str = "application/openmetrics-text;version=2.0.0;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,\
                             text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for open in [PROMETHEUS, NEWER, "application/openmetrics-text", "application/openmetrics-text; version=1.0.0"] {
            assert_eq!(Format::wanted(open), Format::OpenMetrics, "{open}");
        }
        const BROWSER: &str = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";
        let plain =
            ["", "*/*", BROWSER, "text/plain", "image/png", "application/openmetrics-text;q=0", "application/*"];
        for plain in plain
            .into_iter()
            .chain(["application/openmetrics-text;q=0.3,text/plain", "application/openmetrics-text;version=9"])
        {
            assert_eq!(Format::wanted(plain), Format::Text, "{plain}");
        }
    }
}
