//! The address that a request comes from, according to the load balancers on its way.

use std::net::{IpAddr, SocketAddr};

use super::values;

/// The last address of `X-Forwarded-For` that is not a trusted load balancer. The addresses before it can be forged.
/// `None`: the header is missing, or does not hold an address there.
pub fn forwarded_for(headers: &[(&str, &[u8])], is_trusted: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let mut last = None;
    let lines: Vec<&[u8]> = values(headers, "X-Forwarded-For").collect();
    for element in lines
        .into_iter()
        .rev()
        .flat_map(|line| line.rsplit(|&byte| byte == b','))
    {
        let address = address(element.trim_ascii())?;
        if !is_trusted(address) {
            return Some(address);
        }
        last = Some(address);
    }
    last
}

/// With or without a port.
fn address(element: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(element).ok()?;
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let address = text.parse().map(|address: SocketAddr| address.ip());
    address.or_else(|_| bare.parse()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(lines: &[&str]) -> Option<String> {
        let headers: Vec<(&str, &[u8])> = lines.iter().map(|line| ("x-forwarded-for", line.as_bytes())).collect();
        let balancers: [IpAddr; 2] = ["10.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
        forwarded_for(&headers, |address| balancers.contains(&address)).map(|address| address.to_string())
    }

    #[test]
    fn last_address_that_is_no_balancer_counts() {
        for (lines, address) in [
            (&["192.0.2.1"][..], Some("192.0.2.1")),
            (&["203.0.113.9, 192.0.2.1"], Some("192.0.2.1")),
            (&["203.0.113.9, 192.0.2.1, 10.0.0.1"], Some("192.0.2.1")),
            (&["203.0.113.9", "192.0.2.1,10.0.0.1, ::1"], Some("192.0.2.1")),
            (&["192.0.2.1:5555"], Some("192.0.2.1")),
            (&["[2001:db8::1]:5555"], Some("2001:db8::1")),
            (&["[2001:db8::1]"], Some("2001:db8::1")),
            (&["10.0.0.1"], Some("10.0.0.1")),
            (&["192.0.2.1, unknown"], None),
            (&[""], None),
            (&[], None),
        ] {
            assert_eq!(found(lines).as_deref(), address, "{lines:?}");
        }
    }
}
