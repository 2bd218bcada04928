#define _DEFAULT_SOURCE /* getifaddrs, getrandom; NOLINT(bugprone-reserved-identifier,cert-dcl37-c,cert-dcl51-cpp) */

#include "address.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/un.h>
#include <unistd.h>

#include "bytes.h"

#define CARD_VERSION 1u
#define INTERFACE_LIST_BYTES 320u

static const uint8_t magic[4] = {'d', 's', 's', 'C'};
static const char unix_prefix[] = "dssync-";

/* ---- addresses and sockets ---------------------------------------------------------------------------------------------- */

socklen_t dss_address_to_socket(const dss_address_t *address, struct sockaddr_storage *storage) {
    memset(storage, 0, sizeof *storage);
    if (address->family == 4) {
        struct sockaddr_in ipv4 = {.sin_family = AF_INET, .sin_port = htons(address->port)};
        memcpy(&ipv4.sin_addr, address->bytes, sizeof ipv4.sin_addr);
        memcpy(storage, &ipv4, sizeof ipv4);
        return sizeof ipv4;
    }
    if (address->family == 6) {
        struct sockaddr_in6 ipv6 = {.sin6_family = AF_INET6, .sin6_port = htons(address->port)};
        memcpy(&ipv6.sin6_addr, address->bytes, sizeof ipv6.sin6_addr);
        memcpy(storage, &ipv6, sizeof ipv6);
        return sizeof ipv6;
    }
    return 0;
}

void dss_address_from_socket(const struct sockaddr_storage *storage, dss_address_t *address_p) {
    *address_p = (dss_address_t){0};
    if (storage->ss_family == AF_INET) {
        struct sockaddr_in ipv4;
        memcpy(&ipv4, storage, sizeof ipv4);
        address_p->family = 4;
        address_p->port = ntohs(ipv4.sin_port);
        memcpy(address_p->bytes, &ipv4.sin_addr, sizeof ipv4.sin_addr);
    } else if (storage->ss_family == AF_INET6) {
        struct sockaddr_in6 ipv6;
        memcpy(&ipv6, storage, sizeof ipv6);
        address_p->family = 6;
        address_p->port = ntohs(ipv6.sin6_port);
        memcpy(address_p->bytes, &ipv6.sin6_addr, sizeof ipv6.sin6_addr);
    }
}

const char *dss_address_text(const dss_address_t *address, char text[DSS_ADDRESS_TEXT_BYTES]) {
    char number[INET6_ADDRSTRLEN] = "";
    const int family = address->family == 4 ? AF_INET : AF_INET6;
    if ((address->family != 4 && address->family != 6) || !inet_ntop(family, address->bytes, number, sizeof number))
        (void)snprintf(text, DSS_ADDRESS_TEXT_BYTES, "no address");
    else
        (void)snprintf(text, DSS_ADDRESS_TEXT_BYTES, family == AF_INET ? "%s:%u" : "[%s]:%u", number, (unsigned)address->port);
    return text;
}

bool dss_address_is_loopback(const dss_address_t *address) {
    return (address->family == 4 && address->bytes[0] == 127) ||
           (address->family == 6 && dss_bytes_zero(address->bytes, 0, 15) && address->bytes[15] == 1);
}

socklen_t dss_unix_to_socket(const uint8_t name[DSS_UNIX_NAME_BYTES], struct sockaddr_storage *storage) {
    struct sockaddr_un local = {.sun_family = AF_UNIX}; /* sun_path[0] stays 0, which makes the name an abstract one */
    char *next = local.sun_path + 1;
    memcpy(next, unix_prefix, sizeof unix_prefix - 1);
    next += sizeof unix_prefix - 1;
    for (unsigned i = 0; i < DSS_UNIX_NAME_BYTES; i++) { /* in hexadecimal, so that ss and lsof show it */
        *next++ = "0123456789abcdef"[name[i] >> 4];
        *next++ = "0123456789abcdef"[name[i] & 15];
    }
    memset(storage, 0, sizeof *storage);
    memcpy(storage, &local, sizeof local);
    return (socklen_t)(next - (char *)&local);
}

/* ---- where to listen ---------------------------------------------------------------------------------------------------- */

/* Not usable: other families, IPv6 that means nothing without an interface beside it. */
static bool usable(const struct sockaddr *socket_address, dss_address_t *address_p) {
    struct sockaddr_storage storage = {0};
    if (!socket_address || (socket_address->sa_family != AF_INET && socket_address->sa_family != AF_INET6))
        return false;
    memcpy(&storage, socket_address,
           socket_address->sa_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6));
    dss_address_from_socket(&storage, address_p);
    address_p->port = 0;
    return address_p->family == 4 || !(address_p->bytes[0] == 0xfe && (address_p->bytes[1] & 0xc0) == 0x80);
}

/* The name is `name_bytes` long, without a zero at its end. */
static bool find_on_interface(const struct ifaddrs *all, const char *name, size_t name_bytes, dss_address_t *address_p) {
    for (uint8_t family = 4; family <= 6; family += 2)
        for (const struct ifaddrs *each = all; each; each = each->ifa_next)
            if (strlen(each->ifa_name) == name_bytes && memcmp(each->ifa_name, name, name_bytes) == 0 && each->ifa_flags & IFF_UP &&
                usable(each->ifa_addr, address_p) && address_p->family == family)
                return true;
    return false;
}

/* An interface stands in the list once for each of its addresses, and once more for its link. */
static bool named_before(const struct ifaddrs *all, const struct ifaddrs *this) {
    for (; all != this; all = all->ifa_next)
        if (strcmp(all->ifa_name, this->ifa_name) == 0)
            return true;
    return false;
}

static void list_interfaces(const struct ifaddrs *all, char text[INTERFACE_LIST_BYTES]) {
    size_t used = 0;
    text[0] = 0;
    for (const struct ifaddrs *each = all; each && used < INTERFACE_LIST_BYTES; each = each->ifa_next) {
        char number[INET6_ADDRSTRLEN] = "no usable address";
        dss_address_t address;
        if (named_before(all, each))
            continue;
        if (find_on_interface(all, each->ifa_name, strlen(each->ifa_name), &address))
            inet_ntop(address.family == 4 ? AF_INET : AF_INET6, address.bytes, number, sizeof number);
        used += (size_t)snprintf(text + used, INTERFACE_LIST_BYTES - used, "%s%s (%s)", used ? ", " : "", each->ifa_name, number);
    }
}

static dss_status_t choose_by_interface(const char *interfaces, dss_address_t *address_p, dss_error_t *error_p) {
    struct ifaddrs *all = NULL;
    char list[INTERFACE_LIST_BYTES];
    if (getifaddrs(&all) != 0)
        return dss_fail(error_p, DSS_ERR_SYSTEM, "cannot list the network interfaces: %s", strerror(errno));
    dss_status_t status = DSS_ERR_INVALID_ARGUMENT;
    for (const char *name = interfaces, *comma; name && status != DSS_OK; name = comma ? comma + 1 : NULL) {
        dss_address_t address;
        comma = strchr(name, ',');
        if (find_on_interface(all, name, strcspn(name, ","), &address)) {
            *address_p = address;
            status = DSS_OK;
        }
    }
    if (status != DSS_OK) {
        list_interfaces(all, list);
        dss_fail(error_p, status, "no usable address on interface \"%.80s\"; there are: %s", interfaces, list);
    }
    freeifaddrs(all);
    return status;
}

/* The source address that the kernel's routes give for `target`. */
static bool find_source(const struct addrinfo *target, dss_address_t *address_p) {
    struct sockaddr_storage source = {0};
    socklen_t source_bytes = sizeof source;
    const int fd = socket(target->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return false;
    const bool found = connect(fd, target->ai_addr, target->ai_addrlen) == 0 &&
                       getsockname(fd, (struct sockaddr *)&source, &source_bytes) == 0 &&
                       usable((const struct sockaddr *)&source, address_p);
    close(fd);
    return found;
}

static dss_status_t choose_by_route(const char *reach, dss_address_t *address_p, dss_error_t *error_p) {
    const struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_DGRAM};
    struct addrinfo *targets = NULL;
    const int problem = getaddrinfo(reach, "9", &hints, &targets); /* any port: nothing is sent */
    if (problem)
        return dss_fail(error_p, DSS_ERR_INVALID_ARGUMENT, "cannot find the host \"%.200s\": %s", reach,
                        problem == EAI_SYSTEM ? strerror(errno) : gai_strerror(problem));
    dss_status_t status = DSS_ERR_INVALID_ARGUMENT;
    for (const struct addrinfo *target = targets; target && status != DSS_OK; target = target->ai_next) {
        dss_address_t address;
        if (find_source(target, &address)) {
            *address_p = address;
            status = DSS_OK;
        }
    }
    freeaddrinfo(targets);
    if (status != DSS_OK)
        dss_fail(error_p, status, "no route from here to the host \"%.200s\"", reach);
    return status;
}

dss_status_t dss_address_choose(const char *interfaces, const char *reach, dss_address_t *address_p, dss_error_t *error_p) {
    if (interfaces && *interfaces)
        return choose_by_interface(interfaces, address_p, error_p);
    if (reach)
        return choose_by_route(reach, address_p, error_p);
    *address_p = (dss_address_t){.family = 4, .bytes = {127, 0, 0, 1}};
    return DSS_OK;
}

/* ---- cards -------------------------------------------------------------------------------------------------------------- */

static size_t address_bytes(uint8_t family) {
    return family == 4 ? 4 : family == 6 ? 16 : 0;
}

void dss_card_encode(const dss_card_t *card, uint8_t bytes[DSS_CARD_BYTES]) {
    memset(bytes, 0, DSS_CARD_BYTES);
    memcpy(bytes, magic, sizeof magic);
    bytes[4] = CARD_VERSION;
    bytes[5] = card->address.family;
    dss_put_u16(bytes + 6, card->address.family ? card->address.port : 0);
    memcpy(bytes + 8, card->address.bytes, address_bytes(card->address.family));
    bytes[24] = card->has_unix;
    if (card->has_unix)
        memcpy(bytes + 32, card->unix_name, DSS_UNIX_NAME_BYTES);
    dss_put_u64(bytes + 48, card->epoch);
    memcpy(bytes + 56, card->secret, DSS_SECRET_BYTES);
}

/* No text shows bytes from 56 on: in a damaged card a secret may stand anywhere there. */
dss_status_t dss_card_decode(const uint8_t bytes[DSS_CARD_BYTES], dss_card_t *card_p, dss_error_t *error_p) {
    const uint8_t family = bytes[5];
    if (memcmp(bytes, magic, sizeof magic) != 0)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "card: does not begin with \"dssC\"");
    if (bytes[4] != CARD_VERSION)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "card: version %u, expected %u", bytes[4], CARD_VERSION);
    if (family != 0 && family != 4 && family != 6)
        return dss_fail(error_p, DSS_ERR_CORRUPT, "card: address family %u, expected 0, 4 or 6", family);
    if (!dss_bytes_zero(bytes, 8 + address_bytes(family), 24) || (family == 0 && dss_get_u16(bytes + 6) != 0))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "card: more address than family %u has", family);
    if (bytes[24] > 1 || (bytes[24] == 0 && !dss_bytes_zero(bytes, 32, 32 + DSS_UNIX_NAME_BYTES)))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "card: has_unix is %u, and its name is not as that says", bytes[24]);
    if (!dss_bytes_zero(bytes, 25, 32) || !dss_bytes_zero(bytes, 88, DSS_CARD_BYTES))
        return dss_fail(error_p, DSS_ERR_CORRUPT, "card: reserved bytes are not 0");
    *card_p = (dss_card_t){
        .address = {.family = family, .port = dss_get_u16(bytes + 6)},
        .has_unix = bytes[24],
        .epoch = dss_get_u64(bytes + 48),
    };
    memcpy(card_p->address.bytes, bytes + 8, sizeof card_p->address.bytes);
    memcpy(card_p->unix_name, bytes + 32, DSS_UNIX_NAME_BYTES);
    memcpy(card_p->secret, bytes + 56, DSS_SECRET_BYTES);
    return DSS_OK;
}

/* ---- chance ------------------------------------------------------------------------------------------------------------- */

dss_status_t dss_random_bytes(void *bytes, size_t bytes_count, dss_error_t *error_p) {
    uint8_t *next = bytes;
    while (bytes_count) {
        const ssize_t got = getrandom(next, bytes_count, 0);
        if (got < 0 && errno != EINTR)
            return dss_fail(error_p, DSS_ERR_SYSTEM, "the kernel gives no random bytes: %s", strerror(errno));
        if (got > 0) {
            next += got;
            bytes_count -= (size_t)got;
        }
    }
    return DSS_OK;
}
