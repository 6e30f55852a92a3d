from ser_ray.distributed.process_group import interface_of


def test_an_interface_is_found_by_its_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") == ""
