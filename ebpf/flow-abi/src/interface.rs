//! Interface numbers: the interface index, made unique over the observed network namespaces.

/// The namespace's number is above this bit; the gateway's own is 0.
pub const NAMESPACE_SHIFT: u32 = 20;
/// The interface index.
pub const INDEX_MASK: u32 = (1 << NAMESPACE_SHIFT) - 1;
/// Namespaces that have a number.
pub const NAMESPACES_MAX: u32 = 1 << (32 - NAMESPACE_SHIFT);
/// Set in a namespace's entry while it is observed; entries stay, so that a number never means
/// another namespace.
pub const OBSERVED: u32 = 1 << 31;
