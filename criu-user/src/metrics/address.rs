//! Where metrics are served.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

/// An address and port. A bare port (`9477`, `:9477`) is that of the loopback interface: whoever wants others to read it
/// says so in full (`0.0.0.0:9477`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub SocketAddr);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WHAT: &str = "give a port, which is that of the loopback interface, or ADDRESS:PORT with an address in digits: \
                            9477, 127.0.0.1:9477, [::1]:9477, 0.0.0.0:9477";
        let local = |port: &str| Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port.parse().ok()?));
        let port = text.strip_prefix("localhost:").or(text.strip_prefix(':')).unwrap_or(text);
        let address = local(port).or_else(|| text.parse().ok()).ok_or(WHAT)?;
        if address.port() == 0 { Err("port 0 is none: name the one that is to be asked") } else { Ok(Self(address)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_in_full_is_loopback() {
        for text in ["9477", ":9477", "localhost:9477", "127.0.0.1:9477"] {
            assert_eq!(
                text.parse::<Address>().map(|address| address.to_string()),
                Ok("127.0.0.1:9477".to_owned()),
                "{text}"
            );
        }
        for text in ["0.0.0.0:9477", "[::]:9477", "[::1]:9477", "10.1.2.3:80"] {
            assert_eq!(text.parse::<Address>().map(|address| address.to_string()), Ok(text.to_owned()));
        }
        for text in ["", ":", "0", "0.0.0.0:0", "70000", "+9477x", "host:9477", "127.0.0.1", "::1:9477:"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
