//! The world most tests and the demo live in: a client, the gateway, a service.
//!
//! ```text
//!  {prefix}-client            {prefix}-gw                    {prefix}-svc
//!  client0 ───────────────── edge0   svc0 ───────────────── service0
//!  10.77.1.2            10.77.1.1    10.77.2.1             10.77.2.2
//!  fd77:1::2            fd77:1::1    fd77:2::1             fd77:2::2
//!                            mgmt0 10.77.255.2
//!                              │        only on request, for a browser and Prometheus
//!                         em-mgmt 10.77.255.1 on the host itself
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use std::process::Command;

use anyhow::Result;

use super::{End, Mac, Namespace, Veth, ip};
use crate::host;

const SERVICE_BITS_V4: u8 = 24;
const SERVICE_BITS_V6: u8 = 64;
const MANAGEMENT_BITS: &str = "30";

/// Offloads of the gateway's ends: big segments are cut by the kernel's software, so the
/// program sees GSO and GRO and the wire sees frames.
const NEAR_OFFLOADS: &str = "tso off gso on gro on tx-udp-segmentation off";
/// Offloads of the far ends: what a capture sees there is what was on the wire.
const FAR_OFFLOADS: &str = "tso off gso off gro off tx-udp-segmentation off";

/// The interface on the host that leads to the gateway.
pub const MANAGEMENT_DEVICE: &str = "em-mgmt";
/// The host's address on the management link.
pub const MANAGEMENT_HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 255, 1);
/// The gateway's address on the management link.
pub const MANAGEMENT_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 255, 2);

/// One of the gateway's cables: the gateway's end and the far end.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// The interface in the gateway's namespace.
    pub device: &'static str,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its addresses.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// The interface in the other namespace.
    pub far_device: &'static str,
    /// Its Ethernet address.
    pub far_mac: Mac,
    /// Its addresses.
    pub far_v4: Ipv4Addr,
    /// Its IPv6 address.
    pub far_v6: Ipv6Addr,
}

/// The cable that clients come in by.
pub const GATEWAY_TO_CLIENT: Link = Link {
    device: "edge0",
    mac: [2, 0, 0, 0x77, 1, 1],
    v4: Ipv4Addr::new(10, 77, 1, 1),
    v6: Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, 1),
    far_device: "client0",
    far_mac: [2, 0, 0, 0x77, 1, 2],
    far_v4: Ipv4Addr::new(10, 77, 1, 2),
    far_v6: Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, 2),
};

/// The cable that leads to the service.
pub const GATEWAY_TO_SERVICE: Link = Link {
    device: "svc0",
    mac: [2, 0, 0, 0x77, 2, 1],
    v4: Ipv4Addr::new(10, 77, 2, 1),
    v6: Ipv6Addr::new(0xfd77, 2, 0, 0, 0, 0, 0, 1),
    far_device: "service0",
    far_mac: [2, 0, 0, 0x77, 2, 2],
    far_v4: Ipv4Addr::new(10, 77, 2, 2),
    far_v6: Ipv6Addr::new(0xfd77, 2, 0, 0, 0, 0, 0, 2),
};

/// Three hosts in a row.
#[derive(Debug)]
pub struct Topology {
    /// Speaks to the gateway only.
    pub client: Namespace,
    /// In the middle; does not forward packets, it is a proxy.
    pub gateway: Namespace,
    /// Speaks to the gateway only.
    pub service: Namespace,
    has_management: bool,
}

impl Topology {
    /// Creates the three namespaces and the two cables, addressed and silent.
    ///
    /// # Errors
    /// Without root, when a name is taken, or when `ip` or `ethtool` fail.
    pub fn three_hosts(prefix: &str) -> Result<Self> {
        let topology = Self {
            client: Namespace::create(&format!("{prefix}-client"))?,
            gateway: Namespace::create(&format!("{prefix}-gw"))?,
            service: Namespace::create(&format!("{prefix}-svc"))?,
            has_management: false,
        };
        connect(&topology.gateway, &topology.client, &GATEWAY_TO_CLIENT)?;
        connect(&topology.gateway, &topology.service, &GATEWAY_TO_SERVICE)?;
        Ok(topology)
    }

    /// Adds a link from the host itself to the gateway, so that a browser or a Prometheus on
    /// the host reaches the administration port. One run at a time can have it.
    ///
    /// # Errors
    /// When another run has it, or `ip` fails.
    pub fn add_management_link(&mut self) -> Result<()> {
        let gateway = self.gateway.name();
        ip(&[
            "link",
            "add",
            MANAGEMENT_DEVICE,
            "type",
            "veth",
            "peer",
            "name",
            "mgmt0",
            "netns",
            gateway,
        ])?;
        self.has_management = true;
        ip(&["link", "set", MANAGEMENT_DEVICE, "addrgenmode", "none"])?;
        let host = format!("{MANAGEMENT_HOST}/{MANAGEMENT_BITS}");
        ip(&["addr", "add", &host, "dev", MANAGEMENT_DEVICE])?;
        ip(&["link", "set", MANAGEMENT_DEVICE, "up"])?;
        let inside = format!("{MANAGEMENT_GATEWAY}/{MANAGEMENT_BITS}");
        self.gateway
            .ip(&["link", "set", "mgmt0", "addrgenmode", "none"])?;
        self.gateway.ip(&["addr", "add", &inside, "dev", "mgmt0"])?;
        self.gateway.ip(&["link", "set", "mgmt0", "up"])
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        if !self.has_management {
            return;
        }
        // Deleting the namespace would take it too, but later; the next run wants the name now.
        if let Err(error) = ip(&["link", "del", MANAGEMENT_DEVICE]) {
            eprintln!("{MANAGEMENT_DEVICE} is left behind: {error:#}");
        }
    }
}

fn connect(gateway: &Namespace, far: &Namespace, link: &Link) -> Result<()> {
    Veth::pair(
        End {
            namespace: gateway,
            device: link.device,
            mac: link.mac,
        },
        End {
            namespace: far,
            device: link.far_device,
            mac: link.far_mac,
        },
    )?;
    let near_addresses: [IpAddr; 2] = [link.v4.into(), link.v6.into()];
    let far_addresses: [IpAddr; 2] = [link.far_v4.into(), link.far_v6.into()];
    for (near_address, far_address) in near_addresses.into_iter().zip(far_addresses) {
        let bits = if near_address.is_ipv4() {
            SERVICE_BITS_V4
        } else {
            SERVICE_BITS_V6
        };
        gateway.add_address(link.device, near_address, bits)?;
        far.add_address(link.far_device, far_address, bits)?;
        gateway.add_neighbour(link.device, far_address, link.far_mac)?;
        far.add_neighbour(link.far_device, near_address, link.mac)?;
    }
    gateway.offloads(link.device, NEAR_OFFLOADS)?;
    far.offloads(link.far_device, FAR_OFFLOADS)?;
    queue(gateway, link.device)?;
    queue(far, link.far_device)
}

/// With a queue a sender waits when the other end's ring is full; without one the frame would be
/// dropped on the way, after a capture at the sender has counted it.
fn queue(namespace: &Namespace, device: &str) -> Result<()> {
    let name = namespace.name();
    host::run(
        Command::new("tc")
            .args(["-n", name, "qdisc", "replace", "dev", device])
            .args(["root", "pfifo", "limit", "20000"]),
    )
}
