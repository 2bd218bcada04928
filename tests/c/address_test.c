#include "check.h"

#include <errno.h>
#include <sys/socket.h>

#include "address.h"

static const dss_address_t ipv4 = {4, {10, 0, 0, 1}, 3456};
static const dss_address_t ipv6 = {6, {0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, 3456};
static const dss_address_t loopback4 = {4, {127, 0, 0, 1}, 0};
static const dss_address_t loopback6 = {6, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, 0};

static void check_same(const dss_address_t *actual, const dss_address_t *expected) {
    char actual_text[DSS_ADDRESS_TEXT_BYTES];
    char expected_text[DSS_ADDRESS_TEXT_BYTES];
    CHECK_FOR(actual->family == expected->family && actual->port == expected->port &&
                  memcmp(actual->bytes, expected->bytes, sizeof actual->bytes) == 0,
              "%s, expected %s", dss_address_text(actual, actual_text), dss_address_text(expected, expected_text));
}

/* A listening socket on any free port of the address, which becomes *address_p; -1 where the machine does not have the address. */
static int listen_on(dss_address_t *address_p) {
    struct sockaddr_storage storage;
    socklen_t length = dss_address_to_socket(address_p, &storage);
    const int fd = socket(storage.ss_family, SOCK_STREAM, 0);
    if (fd < 0)
        return -1;
    if (bind(fd, (const struct sockaddr *)&storage, length) != 0) {
        close(fd);
        return -1;
    }
    CHECK(listen(fd, 4) == 0);
    length = sizeof storage;
    CHECK(getsockname(fd, (struct sockaddr *)&storage, &length) == 0);
    dss_address_from_socket(&storage, address_p);
    return fd;
}

/* ---- choosing ----------------------------------------------------------------------------------------------------------- */

static void an_interface_is_taken_by_its_name(void) {
    static const char *const lists[] = {"lo", "lo,nope0", "nope0,lo", "nope0,,lo", ",lo"};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        dss_address_t address = {.port = 9};
        dss_error_t error = {DSS_OK, ""};
        CHECK_FOR(dss_address_choose(lists[i], "no such host", &address, &error) == DSS_OK, "%s: %s", lists[i], error.text);
        check_same(&address, &loopback4);
    }
}

static void an_unknown_interface_is_told_with_those_there_are(void) {
    static const char *const lists[] = {"nope0", "l", "lo0,nope0", "lo ", ","};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        dss_address_t address = ipv4;
        dss_error_t error;
        CHECK_STATUS(dss_address_choose(lists[i], NULL, &address, &error), DSS_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(error.status, DSS_ERR_INVALID_ARGUMENT);
        CHECK_CONTAINS(error.text, lists[i]);
        CHECK_CONTAINS(error.text, "lo (127.0.0.1)");
        check_same(&address, &ipv4);
    }
}

static void the_loopback_is_chosen_where_that_reaches(void) {
    dss_address_t address = ipv6;
    dss_error_t error = {DSS_OK, ""};
    CHECK_STATUS(dss_address_choose(NULL, NULL, &address, &error), DSS_OK);
    check_same(&address, &loopback4);
    address = ipv6;
    CHECK_STATUS(dss_address_choose("", "127.0.0.1", &address, &error), DSS_OK);
    check_same(&address, &loopback4);
    dss_address_t listening = loopback6;
    const int fd = listen_on(&listening);
    if (fd < 0)
        return; /* a machine without IPv6 */
    close(fd);
    CHECK_STATUS(dss_address_choose(NULL, "::1", &address, &error), DSS_OK);
    check_same(&address, &loopback6);
}

/* Too long for any resolver, so that none is asked. */
static void a_host_that_is_not_found_is_named(void) {
    char host[400];
    dss_address_t address = ipv4;
    dss_error_t error;
    memset(host, 'h', sizeof host - 1);
    host[sizeof host - 1] = 0;
    CHECK_STATUS(dss_address_choose(NULL, host, &address, &error), DSS_ERR_INVALID_ARGUMENT);
    CHECK_CONTAINS(error.text, "cannot find the host \"hhhh");
    check_same(&address, &ipv4);
}

/* ---- sockets and text --------------------------------------------------------------------------------------------------- */

static void addresses_come_back_from_sockets(void) {
    const dss_address_t *const all[] = {&ipv4, &ipv6, &loopback4, &loopback6};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        struct sockaddr_storage storage;
        dss_address_t back = {.family = 9};
        CHECK(dss_address_to_socket(all[i], &storage) > 0);
        dss_address_from_socket(&storage, &back);
        check_same(&back, all[i]);
    }
    const dss_address_t none = {0};
    struct sockaddr_storage storage;
    dss_address_t back = ipv4;
    CHECK_EQUAL(dss_address_to_socket(&none, &storage), 0);
    dss_address_from_socket(&storage, &back);
    check_same(&back, &none);
}

static void a_real_socket_listens_and_is_reached(void) {
    dss_address_t addresses[] = {loopback4, loopback6};
    for (size_t i = 0; i < sizeof addresses / sizeof *addresses; i++) {
        const int listener = listen_on(&addresses[i]);
        if (listener < 0 && addresses[i].family == 6)
            continue; /* a machine without IPv6 */
        CHECK(listener >= 0 && addresses[i].port != 0);
        struct sockaddr_storage storage;
        const socklen_t length = dss_address_to_socket(&addresses[i], &storage);
        const int caller = socket(storage.ss_family, SOCK_STREAM, 0);
        CHECK(connect(caller, (const struct sockaddr *)&storage, length) == 0);
        close(caller);
        close(listener);
    }
}

static void addresses_read_as_people_write_them(void) {
    const dss_address_t full = {
        6, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe}, 65535};
    const dss_address_t none = {0};
    char text[DSS_ADDRESS_TEXT_BYTES];
    CHECK(dss_address_text(&ipv4, text) == text);
    CHECK_FOR(strcmp(text, "10.0.0.1:3456") == 0, "%s", text);
    CHECK_FOR(strcmp(dss_address_text(&ipv6, text), "[2001:db8::1]:3456") == 0, "%s", text);
    CHECK_FOR(strcmp(dss_address_text(&full, text), "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe]:65535") == 0, "%s", text);
    CHECK_FOR(strcmp(dss_address_text(&none, text), "no address") == 0, "%s", text);
}

static void loopback_is_told_from_the_rest(void) {
    const dss_address_t far_loopback = {4, {127, 255, 1, 2}, 0};
    const dss_address_t none = {0};
    CHECK(dss_address_is_loopback(&loopback4) && dss_address_is_loopback(&loopback6) && dss_address_is_loopback(&far_loopback));
    CHECK(!dss_address_is_loopback(&ipv4) && !dss_address_is_loopback(&ipv6) && !dss_address_is_loopback(&none));
}

static int unix_socket(const uint8_t name[DSS_UNIX_NAME_BYTES], int (*use)(int, const struct sockaddr *, socklen_t),
                       int *result_p) {
    struct sockaddr_storage storage;
    const socklen_t length = dss_unix_to_socket(name, &storage);
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(fd >= 0 && storage.ss_family == AF_UNIX && length <= sizeof storage);
    *result_p = use(fd, (const struct sockaddr *)&storage, length) == 0 ? 0 : errno;
    return fd;
}

static int bind_and_listen(int fd, const struct sockaddr *address, socklen_t length) {
    return bind(fd, address, length) == 0 ? listen(fd, 4) : -1;
}

static int do_connect(int fd, const struct sockaddr *address, socklen_t length) {
    return connect(fd, address, length);
}

static void a_unix_name_is_bound_and_reached(void) {
    uint8_t name[DSS_UNIX_NAME_BYTES];
    int result = -1;
    CHECK_STATUS(dss_random_bytes(name, sizeof name, NULL), DSS_OK);
    name[3] = 0; /* no end of a string */
    const int listener = unix_socket(name, bind_and_listen, &result);
    CHECK_EQUAL(result, 0);
    close(unix_socket(name, bind_and_listen, &result));
    CHECK_EQUAL(result, EADDRINUSE);
    close(unix_socket(name, do_connect, &result));
    CHECK_EQUAL(result, 0);
    name[DSS_UNIX_NAME_BYTES - 1] ^= 1;
    close(unix_socket(name, do_connect, &result));
    CHECK_EQUAL(result, ECONNREFUSED);
    name[DSS_UNIX_NAME_BYTES - 1] ^= 1;
    close(listener);
    close(unix_socket(name, do_connect, &result));
    CHECK_EQUAL(result, ECONNREFUSED); /* nothing stays behind */
}

/* ---- cards -------------------------------------------------------------------------------------------------------------- */

static dss_card_t sample_card(void) {
    dss_card_t card = {.address = ipv6, .has_unix = true, .epoch = 0x0102030405060708u};
    for (unsigned i = 0; i < DSS_UNIX_NAME_BYTES; i++)
        card.unix_name[i] = (uint8_t)(0x40 + i);
    for (unsigned i = 0; i < DSS_SECRET_BYTES; i++)
        card.secret[i] = (uint8_t)(0x60 + i);
    return card;
}

static void check_same_card(const dss_card_t *actual, const dss_card_t *expected) {
    check_same(&actual->address, &expected->address);
    CHECK_EQUAL(actual->has_unix, expected->has_unix);
    CHECK(memcmp(actual->unix_name, expected->unix_name, DSS_UNIX_NAME_BYTES) == 0);
    CHECK_EQUAL(actual->epoch, expected->epoch);
    CHECK(memcmp(actual->secret, expected->secret, DSS_SECRET_BYTES) == 0);
}

static void cards_come_back_as_they_were(void) {
    dss_card_t cards[4] = {sample_card(), sample_card(), sample_card(), {.epoch = 0}};
    cards[1].address = ipv4;
    cards[2].has_unix = false;
    memset(cards[2].unix_name, 0, DSS_UNIX_NAME_BYTES);
    for (unsigned i = 0; i < 4; i++) {
        uint8_t bytes[DSS_CARD_BYTES];
        dss_card_t back;
        memset(&back, 0x5a, sizeof back);
        dss_card_encode(&cards[i], bytes);
        CHECK_STATUS(dss_card_decode(bytes, &back, NULL), DSS_OK);
        check_same_card(&back, &cards[i]);
    }
}

static void the_form_of_a_card_is_fixed(void) {
    uint8_t expected[DSS_CARD_BYTES] = {'d', 's', 's', 'C', 1, 6, 0x80, 0x0d, 0x20, 0x01, 0x0d, 0xb8, [23] = 1, [24] = 1};
    static const uint8_t epoch[8] = {8, 7, 6, 5, 4, 3, 2, 1};
    const dss_card_t card = sample_card();
    uint8_t bytes[DSS_CARD_BYTES];
    memcpy(expected + 32, card.unix_name, DSS_UNIX_NAME_BYTES);
    memcpy(expected + 48, epoch, sizeof epoch);
    memcpy(expected + 56, card.secret, DSS_SECRET_BYTES);
    memset(bytes, 0xff, sizeof bytes);
    dss_card_encode(&card, bytes);
    CHECK(memcmp(bytes, expected, sizeof bytes) == 0);
}

/* What a card does not use is not sent: the sender's memory is nobody's business, and each card has one form. */
static void unused_fields_are_sent_as_zeros(void) {
    dss_card_t card = sample_card();
    uint8_t bytes[DSS_CARD_BYTES];
    card.address = ipv4;
    memset(card.address.bytes + 4, 0xee, 12);
    card.has_unix = false;
    dss_card_encode(&card, bytes);
    CHECK_STATUS(dss_card_decode(bytes, &card, NULL), DSS_OK);
    check_same(&card.address, &ipv4);
    for (unsigned i = 0; i < DSS_UNIX_NAME_BYTES; i++)
        CHECK_EQUAL(card.unix_name[i], 0);
}

/* Every value of every byte, of each family: refused without a word of the secret, or a card with these very bytes. */
static void a_damaged_card_is_refused_or_means_what_it_says(void) {
    for (unsigned family = 0; family < 3; family++)
        for (size_t at = 0; at < DSS_CARD_BYTES; at++)
            for (unsigned value = 0; value < 256; value++) {
                dss_card_t card = sample_card();
                dss_error_t error = {DSS_OK, ""};
                uint8_t bytes[DSS_CARD_BYTES];
                uint8_t again[DSS_CARD_BYTES];
                card.address = family == 0 ? (dss_address_t){0} : family == 1 ? ipv4 : ipv6;
                dss_card_encode(&card, bytes);
                const bool changed = bytes[at] != value;
                bytes[at] = (uint8_t)value;
                if (dss_card_decode(bytes, &card, &error) == DSS_OK) {
                    dss_card_encode(&card, again);
                    CHECK_FOR(memcmp(again, bytes, sizeof bytes) == 0, "byte %zu = %u", at, value);
                    CHECK_FOR(!changed || (at > 4 && at < 24) || (at > 31 && at < 88), "byte %zu = %u", at, value);
                } else {
                    CHECK_STATUS(error.status, DSS_ERR_CORRUPT);
                    CHECK_CONTAINS(error.text, "card: ");
                    CHECK_FOR(!strstr(error.text, "6061") && !strstr(error.text, "abc"), "%s", error.text);
                }
            }
}

static void random_bytes_are_all_asked_for_and_no_more(void) {
    uint8_t bytes[100] = {0};
    uint8_t other[100] = {0};
    unsigned zero_count = 0;
    CHECK_STATUS(dss_random_bytes(bytes + 1, 98, NULL), DSS_OK);
    CHECK_STATUS(dss_random_bytes(other + 1, 98, NULL), DSS_OK);
    CHECK(bytes[0] == 0 && bytes[99] == 0);
    CHECK(memcmp(bytes, other, sizeof bytes) != 0);
    for (unsigned i = 1; i < 99; i++)
        zero_count += bytes[i] == 0;
    CHECK_FOR(zero_count < 20, "%u", zero_count); /* chance: below 1 in 10^25 */
}

int main(void) {
    RUN(an_interface_is_taken_by_its_name);
    RUN(an_unknown_interface_is_told_with_those_there_are);
    RUN(the_loopback_is_chosen_where_that_reaches);
    RUN(a_host_that_is_not_found_is_named);
    RUN(addresses_come_back_from_sockets);
    RUN(a_real_socket_listens_and_is_reached);
    RUN(addresses_read_as_people_write_them);
    RUN(loopback_is_told_from_the_rest);
    RUN(a_unix_name_is_bound_and_reached);
    RUN(cards_come_back_as_they_were);
    RUN(the_form_of_a_card_is_fixed);
    RUN(unused_fields_are_sent_as_zeros);
    RUN(a_damaged_card_is_refused_or_means_what_it_says);
    RUN(random_bytes_are_all_asked_for_and_no_more);
}
